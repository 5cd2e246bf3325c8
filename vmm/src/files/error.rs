//! Why the file server cannot serve.

use std::io;

use husk_control::PacketError;

/// Why the file server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The control socket failed, or carried something that is no request.
    #[error("control socket of the file server")]
    Control(#[from] PacketError),
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
    /// The vhost-user socket failed.
    #[error("vhost-user: {0}")]
    VhostUser(String),
}
