//! The two roles of `husk-vmm` as seen from outside: processes, driven over control sockets.

mod address;
mod client;
mod error;
mod files;
mod network;
mod oom_score;
mod pidfd;
mod process;

pub use address::StreamAddress;
pub use client::{Machine, MachineEnd};
pub(crate) use client::{receive, send};
pub use error::MachineError;
pub use files::FileServer;
pub use network::NetworkNamespace;
pub use oom_score::{OomScore, own_oom_score};
pub use pidfd::PidFd;
pub(crate) use pidfd::watched_fd;
pub use process::{Child, Program, Role};
