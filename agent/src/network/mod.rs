//! The guest's network: what the host's namespace holds, on devices of the guest's.
//!
//! The host tells the whole state each time; [`Network::apply`] does what has changed since. What a
//! container has set by itself stays, unless it stands in the way.

mod apply;
pub mod change;
mod device;
pub mod filter;
mod forward;
mod netlink;
mod resolver;

pub use apply::{Network, Refused, State, WantedInterface, loopback_up};
pub use forward::{ForwardError, forward};
pub use resolver::serve as serve_resolver;
