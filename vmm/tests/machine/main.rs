//! A handful of instructions on the host's own KVM, driven over the control socket as the shim does
//! it. Where /dev/kvm is missing or does not run guests' kernels, each test says that it skipped.

// Everything here is a test, helpers included.
#![allow(clippy::unwrap_used)]

mod guest;
mod life;
mod network;
mod state;
