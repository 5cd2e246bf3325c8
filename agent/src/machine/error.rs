//! Why the guest did not follow its machine.

use std::io;
use std::path::PathBuf;

/// Why the guest did not follow its machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A guest without processors would not even say so.
    #[error("a guest has at least one processor on line")]
    NoProcessor,
    /// The kernel was not told of so many at its start.
    #[error("{wanted} processors were asked for, and this guest has room for {room}")]
    Room {
        /// How many were asked for.
        wanted: u32,
        /// How many there are, on line or not.
        room: usize,
    },
    /// The kernel does not say, or says what cannot be understood.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses.
    #[error("{what}: {source}")]
    Refused {
        /// What was asked of it.
        what: String,
        /// Why.
        source: io::Error,
    },
}
