//! Containers: each has a bundle directory, a cgroup, an init process and exec'd ones.
//!
//! ```text
//!                                 paused
//!                                  │  ▲
//!                            resume▼  │pause
//! creating ──▶ created ──start──▶ running ──init exits──▶ stopped ──▶ (gone)
//!                 └──────────────init killed──────────────▶┘
//! ```
//!
//! The making of processes is [`helper`]'s, a process of its own.

mod bundle;
mod cgroup;
pub mod changes;
mod create;
mod delete;
pub mod devices;
mod error;
pub mod exec;
mod execute;
pub mod helper;
mod lifecycle;
mod limits;
pub mod memory;
mod pids;
pub mod spec;
mod statistics;
mod validity;
mod volumes;

pub use cgroup::Cgroup;
pub use create::{Parts, create};
pub use delete::delete;
pub use error::{ContainerError, Tried, check_id};
pub use exec::exec;
pub use execute::{Making, execute};
pub use lifecycle::Container;
pub use pids::{Holder, SharedPids};
pub use statistics::Counters;
pub use validity::Validity;
pub use volumes::Volumes;
