//! What can go wrong between us and `husk-vmm`.

use std::io;
use std::path::PathBuf;

use husk_control::PacketError;
use nix::errno::Errno;

/// Why a process of `husk-vmm` did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The process could not be watched.
    #[error("cannot watch the process of {program}")]
    Watch {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There was no socket pair for a stream.
    #[error("cannot make a socket pair for a stream of the guest's")]
    Pair {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control socket failed, or something came over it that is no message.
    #[error("machine process")]
    Control(#[source] PacketError),
    /// The process answered that it could not.
    #[error("{0}")]
    Refused(String),
    /// The process has ended.
    #[error("{0}")]
    Ended(String),
    /// An answer of the wrong kind.
    #[error("the machine process gave an answer of the wrong kind")]
    WrongAnswer,
}
