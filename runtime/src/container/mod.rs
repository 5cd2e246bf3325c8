//! Containers and their processes, as the host keeps account of them.
//!
//! A process's life:
//!
//! ```text
//!                      Paused
//!                       ▲  │
//!                 pause │  │ resume
//!                       │  ▼
//!   Created ──start──▶ Running ──exit──▶ Stopped
//!      └────────────────killed──────────────▲
//! ```
//!
//! An exec'd process exists for containerd before it exists in the guest; [`exec`] has its states.

mod bounds;
mod changes;
#[expect(clippy::module_inception, reason = "a container is what the folder is about")]
mod container;
mod control;
mod error;
mod exec;
mod hooks;
mod lay_out;
mod out_of_memory;
mod process;
mod size;

pub use husk_agent_protocols::agent::{InterfaceUse, StatContainerResponse as Statistics};

pub use crate::apart::HostMounts;
pub use bounds::Bounds;
pub use container::{Container, CreateRequest, Follower, GuestProcess};
pub use error::ContainerError;
pub use exec::{Exec, ExecRequest};
pub use hooks::{HookError, HostHooks};
pub use process::{Exit, Happening, Observer, Process, Status};
pub use size::{MachineSize, ResizeError, SizePlan};
