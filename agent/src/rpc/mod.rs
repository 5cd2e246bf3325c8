//! The ttrpc service on the one connection to the host. Wire types end here.

mod connection;
mod serve;
pub mod service;
mod status;

pub use connection::connect;
pub use serve::serve;
