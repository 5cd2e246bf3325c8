//! What the end-to-end tests are made of: a client of the real containerd, and listings of what a
//! machine holds, to show that nothing was left behind.

pub mod client;
pub mod containerd;
pub mod cri;
pub mod events;
pub mod leftovers;
pub mod network;
pub mod processes;
pub mod streaming;
pub mod task;
pub mod terminal;
pub mod wait;
