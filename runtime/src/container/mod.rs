//! Containers and their processes, as the host keeps account of them.
//!
//! A process's life:
//!
//! ```text
//!   Created ──start──▶ Running ──exit──▶ Stopped
//!      └────────────────killed──────────────▲
//! ```
//!
//! An exec'd process exists for containerd before it exists in the guest: it is [`process::Added`]
//! until it is started.

#[expect(clippy::module_inception, reason = "a container is what the folder is about")]
mod container;
mod error;
mod exec;
mod process;

pub use container::{Container, CreateRequest, Follower, GuestProcess};
pub use error::ContainerError;
pub use exec::{Exec, ExecRequest};
pub use process::{Exit, Happening, Observer, Process, Status};
