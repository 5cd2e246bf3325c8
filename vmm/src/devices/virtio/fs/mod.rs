//! File system device (virtio 1.2, section 5.11): a courier of FUSE messages.
//!
//! The device opens no files and understands no more of FUSE than the frames. Each request of the
//! guest goes out on one of several channels (UNIX stream sockets) to the file server, straight from
//! guest memory, and the answer comes back straight into it. A channel carries one request at a
//! time; while all are busy the queues wait.
//!
//! ```text
//!             request                 all sent                     answer whole
//!   Idle ───────────────▶ Sending ─────────────────▶ Waiting ─────────────────────▶ Idle
//!     ▲                      │   no answer expected     │
//!     └──────────────────────┴──────────────────────────┘
//!                            │ socket fails, or answer out of frame
//!                            ▼
//!                          Dead: its request gets EIO
//! ```
//!
//! Neither side of the socket has to trust guest memory: the request's header is copied out, checked
//! and sent from the copy, so the guest cannot move the frame afterwards; the answer's header is
//! received into a copy and checked (length, unique number) before the guest sees it.
//!
//! Without channels left, every request gets `ENOTCONN`, and the machine goes on.
//!
//! When the driver resets the device, answers still under way are read and thrown away.
//!
//! The device can be saved only while no request is under way ([`SaveError::Busy`]); what the file
//! server knows of the guest (nodes, handles) is not part of its state.
//!
//! [`SaveError::Busy`]: crate::devices::virtio::state::SaveError::Busy

mod channel;
mod device;
mod event_handler;
mod message;
#[cfg(test)]
mod tests;

pub use device::{Fs, FsError, FsState, MAX_TAG};
