//! The sandbox: what all containers of the guest share, and the list of them.

mod registry;
mod shell;
pub mod start;

pub use registry::Sandbox;
pub use shell::ShellStart;
pub use start::{Setup, StartError};
