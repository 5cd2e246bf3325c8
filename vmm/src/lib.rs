//! Husk's virtual machine monitor.
//!
//! One binary with two roles, both driven over a control socket (crate `husk-control`):
//! [`machine`] runs one guest on KVM, [`files`] answers the FUSE requests that the machine carries
//! out of the guest. This crate is synchronous and knows neither OCI nor containerd.

pub mod arch;
pub mod bus;
mod capabilities;
pub mod devices;
pub mod files;
mod fuse;
pub mod jail;
pub mod launcher;
pub mod machine;
pub mod probe;
pub mod seccomp;
pub mod vcpu;
pub mod vm;
