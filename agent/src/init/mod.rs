//! What makes a booted kernel a guest: the root and its mounts, the reaper, the log, the end.
//!
//! Boot speed counts, so only what the agent itself needs happens before the host is dialled; the
//! rest happens in StartSandbox, while the host prepares the first container.

pub mod calls;
mod log;
pub mod mounts;
pub mod power;
pub mod reaper;
mod run;

pub use run::{component, guest};
