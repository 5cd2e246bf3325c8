//! The agent in the guest, called over the stream it opened itself.
//!
//! Answers come from the guest: only their declared fields are looked at, and texts are cut.

mod client;
mod gate;

pub(crate) use client::sanitize;
pub use client::{AgentClient, AgentError, Code};
