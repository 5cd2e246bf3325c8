//! The file server role: `husk-vmm files`.
//!
//! It is handed a folder and answers FUSE requests on it, until its control socket closes. The guest
//! writes those requests, so each length, name, number and handle in them is hostile. Two borders
//! bring them in:
//!
//! - [`courier`](self): the machine process copies each request out of guest memory and sends it
//!   over a stream socket (a *channel*), one at a time; this process sees no guest memory.
//! - vhost-user: a front end whose guest memory is shared hands over the virtqueues themselves.
//!
//! The messages are taken apart by fuse-backend-rs; the file system under them is our own `tree`.

mod buffer;
mod courier;
mod error;
mod message;
mod serve;
mod tree;
mod vhost_user;

pub use error::FilesError;
pub use serve::{run, run_jailed, serve_one};
