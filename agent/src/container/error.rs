//! What can go wrong with a container.

use std::io;
use std::time::Duration;

use crate::container::lifecycle::State;
use crate::container::spec::SpecError;
use crate::process::SignalError;

/// Why something could not be done with a container or one of its processes.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No such container, or no such process in it.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}: already exists")]
    Exists(String),
    /// The id cannot name a container or process.
    #[error("invalid id {0:?}: 1 to 128 letters, digits and any of _.-+ after the first")]
    Id(String),
    /// The container is not in the state this needs.
    #[error("container {id} is {state}, {need}")]
    State {
        /// The container.
        id: String,
        /// What it is.
        state: State,
        /// What it has to be.
        need: &'static str,
    },
    /// The spec is not one this guest can run.
    #[error("spec: {0}")]
    Spec(#[from] SpecError),
    /// The command cannot be executed: text and meaning as runc's.
    #[error("unable to start container process: {0}")]
    Command(String),
    /// Making the process failed otherwise.
    #[error("unable to start container process: {0}")]
    Helper(String),
    /// A signal could not be sent.
    #[error(transparent)]
    Signal(#[from] SignalError),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The refusal.
        source: io::Error,
    },
}

impl ContainerError {
    /// The error of a process that is not there after `limit`.
    pub(super) fn late(limit: Duration) -> Self {
        let seconds = limit.as_secs();
        Self::Helper(format!(
            "it did not begin within {seconds} s; probably a file system of the container does not answer"
        ))
    }
}

/// Names what was tried when it fails.
pub trait Tried<T> {
    /// The error with `what` before it.
    fn tried(self, what: &'static str) -> Result<T, ContainerError>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: &'static str) -> Result<T, ContainerError> {
        self.map_err(|e| ContainerError::System { what, source: e.into() })
    }
}

/// Ids become file names, so they may be nothing else.
pub fn check_id(id: &str) -> Result<(), ContainerError> {
    let letter = |b: u8| b.is_ascii_alphanumeric();
    let valid = (1..=128).contains(&id.len())
        && id.bytes().next().is_some_and(letter)
        && id.bytes().all(|b| letter(b) || b"_.-+".contains(&b));
    if valid { Ok(()) } else { Err(ContainerError::Id(id.chars().take(128).collect())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_their_directory() {
        for id in ["a", "0f3", "web_1.2-x+y"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "-a", "a\n", "ä", &"x".repeat(129)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
