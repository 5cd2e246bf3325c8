//! The one PCI bus: a function's configuration space and its memory ranges (BARs).
//!
//! BARs are placed by the machine, and the guest may move those below 4 GiB. What it moves a range over
//! is its own loss: where memory is KVM never asks us, and of two ranges at one place the function in
//! the lower slot answers.
//!
//! Functions come and go while the guest runs. It finds a new one when it scans the bus again, and
//! should have let go of one that is taken away.

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
