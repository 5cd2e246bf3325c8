//! The network that an engine laid into a namespace, and how the guest comes by it.
//!
//! [`Namespace`] is the namespace and a netlink socket in it. [`Found`] is what it holds, by
//! netlink: interfaces worth carrying, and what belongs to them. Each interface is joined with a
//! tap of the machine's ([`Tap`], [`redirect`]): frames that come in by one go out by the other, and
//! the namespace's own stack sees none. The guest's device then wears the interface's name and
//! addresses ([`Found::state`]), and carries out the namespace's packet filter rules, which this passes by
//! ([`Filter`]). What is dialled at the namespace's loopback addresses is accepted by [`Loopback`].

mod filter;
mod found;
mod loopback;
mod namespace;
pub mod redirect;
pub mod resolver;
mod scan;
mod state;
mod tap;
#[cfg(test)]
mod tests;

pub use filter::{Filter, Uncarried};
pub use found::{Found, Interface};
pub use loopback::Loopback;
pub use namespace::{Namespace, NetworkError};
pub use state::LOOPBACK;
pub use tap::{Tap, is_tap_name};
