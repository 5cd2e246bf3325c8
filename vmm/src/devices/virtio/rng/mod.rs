//! Entropy device (virtio 1.2, section 5.4): one queue, filled from the host's `getrandom`.

mod device;
mod event_handler;

pub use device::{Rng, RngState};
