//! What a sandbox is: a machine, a file server, an agent, and the containers in it.
//!
//! The crate knows neither containerd nor KVM: the shim calls it, and it speaks to `husk-vmm` over
//! control sockets and to the agent over ttrpc. What comes from either is treated as hostile.
//!
//! A container's way through it: [`sandbox::Sandbox::create`] boots the machine;
//! [`sandbox::Sandbox::create_container`] mounts the root file system and the volumes into the
//! shared folder ([`resource`]), translates the OCI spec ([`spec`]), opens the streams ([`io`]) and
//! asks the agent ([`agent_client`]); [`container::Process`] follows each process to its end.

pub mod agent_client;
pub mod apart;
pub mod check;
pub mod container;
mod error;
pub mod io;
mod lock;
pub mod machine;
pub mod operator;
pub mod printable;
pub mod resource;
pub mod sandbox;
pub mod shell;
pub mod spec;
pub mod state;

pub use error::chain;
