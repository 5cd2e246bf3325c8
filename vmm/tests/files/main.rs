//! The file server, driven over its sockets without a guest.

#![allow(clippy::unwrap_used)] // A failed test is a panic.

mod client;
mod escapes;
mod kernel;
mod messages;
mod mounts;
mod operations;
mod vhost;
