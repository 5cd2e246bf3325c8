//! The guest's side of a machine that changes while it runs: processors on and off line, devices
//! that come, memory that is plugged, a clock that follows the host's.

pub mod clock;
mod devices;
mod error;
mod interfaces;
mod processors;

pub use devices::{look_for_devices, rescan};
pub use error::MachineError;
pub use interfaces::{Interface, interfaces};
pub use processors::set_processors;
