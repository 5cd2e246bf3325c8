//! The errors of laying out a container's files.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use super::MountOptionsError;

/// A container's files could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A folder or file of Husk's own could not be made.
    #[error("cannot make {path}")]
    Place {
        /// The folder or file.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// A volume's source cannot be opened.
    #[error("cannot use {path}")]
    Source {
        /// The source on the host.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// A volume's source became a device, a socket or a FIFO after it was looked at.
    #[error("cannot use {path}: it is neither a folder nor a regular file any more")]
    Kind {
        /// The source on the host.
        path: PathBuf,
    },
    /// A mount failed.
    #[error("cannot mount {what} on {target}")]
    Mount {
        /// The file system and its source.
        what: String,
        /// The folder or file that was to be mounted on.
        target: PathBuf,
        /// The refusal.
        #[source]
        source: Errno,
    },
    /// A mount option that cannot be granted.
    #[error(transparent)]
    Options(#[from] MountOptionsError),
    /// A mount's place inside the root file system leads out of it.
    #[error("the mount target {0} leads out of the root file system")]
    OutsideTarget(String),
    /// No thread could be started for the work, or a source does not answer.
    #[error("cannot do so in a thread of its own")]
    Thread(#[source] io::Error),
}
