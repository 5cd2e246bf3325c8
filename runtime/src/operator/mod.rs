//! What an operator sees of the sandboxes of this host: `husk ps` and `husk logs`.
//!
//! All of it is read from their folders and from /proc: it works whatever state their shims are in.

mod list;
mod logs;

pub use list::{SandboxState, SandboxView, list};
pub use logs::{LogsError, console};
