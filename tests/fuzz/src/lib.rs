//! What a fuzzer calls: bodies that must survive every input.

pub mod agent_answers;
pub mod agent_requests;
mod answers;
pub mod bus;
pub mod configuration;
pub mod control;
pub mod courier;
mod file;
mod input;
mod interrupt;
mod json;
pub mod kernel;
mod kvm;
pub mod net;
mod parts;
pub mod spec;
pub mod states;
pub mod vsock;
