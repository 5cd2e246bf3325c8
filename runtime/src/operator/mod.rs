//! What an operator sees of the sandboxes of this host: `husk ps` and `husk logs`, and how `husk exec`
//! finds its sandbox.
//!
//! All of it is read from their folders and from /proc: it works whatever state their shims are in.

mod find;
mod list;
mod logs;

pub use find::{FindError, find};
pub use list::{SandboxState, SandboxView, list};
pub use logs::{LogsError, console};
