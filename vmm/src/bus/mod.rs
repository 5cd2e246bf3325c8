//! Buses: how an access of a vCPU finds its device.

mod dispatch;
pub mod pci;

pub use dispatch::{Bus, BusError, SharedDevice};

/// A device behind a range of ports or of guest-physical addresses.
///
/// Offsets are relative to the range and confined to it by the bus; `data` is 1, 2, 4 or 8 bytes.
/// What the device does not know reads as all ones and is ignored when written.
pub trait BusDevice: Send {
    /// The guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}
