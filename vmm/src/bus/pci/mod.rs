//! The one PCI bus: a function's configuration space and its memory ranges (BARs).
//!
//! BARs are placed by the machine and stay where they are: the guest may size them, but a write of
//! another address is ignored, so that no guest can move a range over another's.

mod configuration;
mod host_bridge;
mod ports;
mod slots;
mod window;

pub use configuration::{CONFIG_SIZE, ConfigSpace, ConfigSpaceError, ConfigSpaceState, Identity};
pub use host_bridge::HostBridge;
pub use ports::{ConfigPorts, ConfigPortsState};
pub use slots::{PciBus, PciError, SharedFunction};
pub use window::PciWindow;

/// A memory range of a function, placed by the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which BAR it is, 0 to 5 (a 64-bit one takes two).
    pub index: u8,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes; a power of two.
    pub size: u64,
}

/// One function of one device on the bus.
pub trait PciFunction: Send {
    /// Reads within the 256 bytes of configuration space; `offset + data.len()` never passes 256.
    fn config_read(&mut self, offset: u8, data: &mut [u8]);
    /// Writes within configuration space, under the same bound.
    fn config_write(&mut self, offset: u8, data: &[u8]);
    /// The function's memory ranges.
    fn bars(&self) -> Vec<Bar>;
    /// Reads within a BAR; `offset + data.len()` never passes its size.
    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]);
    /// Writes within a BAR, under the same bound.
    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]);
}
