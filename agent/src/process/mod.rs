//! Processes: their exits, their signals, and the relays between their standard streams and the
//! host.

mod follow;
mod inlet;
mod outlet;
mod readiness;
mod stdio;
mod terminal;
mod unborn;

pub use follow::{Process, SignalError};
pub use stdio::{Links, Request, Stdio, open};
pub use unborn::Unborn;
