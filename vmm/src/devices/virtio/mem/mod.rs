//! Memory device (virtio 1.2, section 5.15): the guest's memory grows and shrinks while it runs.
//!
//! The host says how much memory beyond what it was booted with the guest is to have
//! ([`Mem::request`]); the guest plugs and unplugs blocks of a range of guest-physical addresses, one
//! request at a time, as it comes to it. What it asks for is checked against the table of blocks
//! : a range of whole blocks inside the device's, all unplugged or all plugged, and
//! never more than it is to have. A guest that takes nothing, or gives nothing back, goes on as it is;
//! whoever waits for it ([`Mem::wait`]) does so for as long as he likes.
//!
//! Blocks stay as they are when the driver resets the device: memory in use does not vanish.
//!
//! System calls, in the event loop: `mmap` and `munmap` (once), `mprotect`, `madvise`, and KVM's
//! `KVM_SET_USER_MEMORY_REGION`.

mod blocks;
mod device;
mod event_handler;
mod request;
mod state;

pub use blocks::Counters;
pub use device::{Mem, Watcher};
pub use state::MemState;
