//! The guest-physical window in which all BARs lie, as one device of the memory bus.

use std::sync::Arc;

use super::PciBus;
use crate::bus::BusDevice;

/// The window; its offsets are relative to `base`.
pub struct PciWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl PciWindow {
    /// The window that starts at `base`.
    pub fn new(bus: Arc<PciBus>, base: u64) -> Self {
        Self { bus, base }
    }
}

impl BusDevice for PciWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bus.memory_read(self.base.saturating_add(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bus.memory_write(self.base.saturating_add(offset), data);
    }
}
