//! Socket device (virtio 1.2, section 5.10), all in user space.
//!
//! Every stream of the guest is joined to one end of a UNIX socket pair; the other end goes to the
//! machine role through [`StreamSink`], or is with whoever gave this one. The guest may connect only to
//! host ports that were opened with [`Vsock::listen`]; everything else gets a reset. Only streams exist, no
//! sequenced packets.
//!
//! A connection's life:
//!
//! ```text
//!   connect() ──▶ Requested ── RESPONSE ──▶ Open ◀── accepted ── REQUEST of the guest
//!                     │                      │
//!                  RST│             RST, or  │  both directions shut by the guest
//!                     ▼                      ▼
//!             connected(Err)              Leaving ── backlog flushed ──▶ gone
//! ```
//!
//! Each direction of an open connection ends by itself. The host end's end-of-file becomes
//! `SHUTDOWN(SEND)`, the host end no longer being read becomes `SHUTDOWN(RECEIVE)`; the guest's
//! `SHUTDOWN(SEND)` becomes `shutdown(SHUT_WR)` once everything before it is flushed. What the guest
//! sent before it went away is always delivered.
//!
//! Credit: the guest may have [`BUFFER`] bytes under way per connection. Its bytes are written from
//! guest memory straight into the socket; only what the socket does not take is kept, and counts as
//! not forwarded, so that no guest can make the device keep more. Towards the guest, bytes are read
//! from the socket straight into its receive buffers, several packets per system call, connections
//! taking turns.
//!
//! Connections are not carried over save and restore: after a restore the guest gets
//! `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, and ports must be opened anew.
//!
//! Locking: the sink is called with the device locked, always from the event loop's thread, and must
//! not call the device.

mod backlog;
mod connection;
mod credit;
mod device;
mod event_handler;
mod incoming;
mod mux;
mod outgoing;
mod packet;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

pub use credit::BUFFER;
pub use device::Vsock;
pub use mux::{Counters, Listener, MAX_CONNECTIONS};
pub use state::VsockState;

/// Where streams go.
pub trait StreamSink: Send {
    /// The guest has connected to a port listened on; no `stream` for one opened by
    /// [`Listener::over`].
    fn connection(&mut self, port: u32, stream: Option<OwnedFd>);
    /// What came of [`Vsock::connect`] with that number.
    fn connected(&mut self, request: u64, result: Result<OwnedFd, ConnectError>);
}

/// Why a connection into the guest did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The guest has no driver for sockets, or not yet.
    #[error("the guest's socket driver is not ready")]
    NotReady,
    /// The guest refused, or nobody listens there.
    #[error("the guest refused the connection")]
    Refused,
    /// The guest reset the device meanwhile.
    #[error("the guest reset its socket device")]
    Reset,
    /// [`MAX_CONNECTIONS`] are open.
    #[error("too many connections")]
    TooMany,
    /// No socket pair could be had.
    #[error("socket pair")]
    Socket(#[source] std::io::Error),
}
