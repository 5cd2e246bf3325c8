//! The machine role: one guest, driven over the control socket.
//!
//! ```text
//!   waiting for Boot ──built──▶ running ──reset, panic, triple fault, socket closed──▶ ended
//!          │                                                                             │
//!          └──── an error is the answer; the process exits with 1      Event::Ended, exit ┘
//! ```
//!
//! One thread does all but run vCPUs: it waits on the control socket, the devices' queues and the
//! streams of the guest.

mod build;
mod control;
mod devices;
mod end;
mod instance;
mod memory;
mod network;
mod plug;
mod run;
mod streams;
mod terminate;

pub use build::{BuildError, Resources, build};
pub use control::Control;
pub use end::EndSignal;
pub use instance::Machine;
pub use network::{NetworkError, NetworkParts};
pub use plug::PlugError;
pub(crate) use run::chain;
pub use run::{MachineError, run};
pub use terminate::install as end_by_signal;

/// The event loop and what it calls.
pub type EventLoop = event_manager::EventManager<Box<dyn event_manager::MutEventSubscriber>>;
