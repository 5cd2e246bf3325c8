//! How long a guest may take for what it must not be able to hold up: the end of its processes.

use std::time::Duration;

/// How long a guest may take. One that takes longer loses its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// To answer that a process is sent SIGKILL.
    pub kill_answer: Duration,
    /// To tell of the end of a process that was killed.
    pub kill_end: Duration,
    /// To remove what a container that has ended left in it.
    pub delete: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            kill_answer: Duration::from_secs(10),
            // A process with much memory takes its time.
            kill_end: Duration::from_secs(20),
            delete: Duration::from_secs(20),
        }
    }
}
