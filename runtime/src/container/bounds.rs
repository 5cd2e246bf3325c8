//! How long a guest may take for what it must not be able to hold up, the end of its processes; and how long
//! the host's file systems may take.

use std::time::Duration;

use crate::apart::{CLEAR, OPEN};

/// How long a guest may take. One that takes longer loses its machine. And how long file systems may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// To answer that a process is sent SIGKILL.
    pub kill_answer: Duration,
    /// To tell of the end of a process that was killed.
    pub kill_end: Duration,
    /// To remove what a container that has ended left in it.
    pub delete: Duration,
    /// For the host to open and mount what a container has; then the container is not created.
    pub lay_out: Duration,
    /// For the host to unmount it again; then it is left to a thread.
    pub unmount: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            kill_answer: Duration::from_secs(10),
            // A process with much memory takes its time.
            kill_end: Duration::from_secs(20),
            delete: Duration::from_secs(20),
            lay_out: OPEN,
            unmount: CLEAR,
        }
    }
}
