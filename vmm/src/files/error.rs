//! Why the file server cannot serve.

use std::io;

use husk_control::PacketError;

use crate::jail::JailError;
use crate::seccomp::SeccompError;

/// Why the file server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The control socket failed, or carried something that is no request.
    #[error("control socket of the file server")]
    Control(#[from] PacketError),
    /// The jail could not be closed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A thread could not be confined.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// A second request to serve.
    #[error("the file server serves one folder only")]
    AlreadyServing,
    /// The request names no way for FUSE messages to come in.
    #[error("the file server was given neither channels nor a vhost-user socket")]
    NoBorder,
    /// The shared folder cannot be used.
    #[error("shared folder")]
    Folder(#[source] io::Error),
    /// The threads' rights or file descriptors cannot be set up.
    #[error("set-up of the file server")]
    SetUp(#[source] io::Error),
    /// A channel failed, or carried something that cannot be followed.
    #[error("channel of FUSE messages")]
    Channel(#[source] io::Error),
    /// The vhost-user socket failed.
    #[error("vhost-user: {0}")]
    VhostUser(String),
}
