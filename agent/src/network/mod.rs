//! The guest's network: the loopback device.

mod loopback;

pub use loopback::loopback_up;
