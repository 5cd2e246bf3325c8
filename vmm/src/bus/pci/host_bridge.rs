//! The host bridge in slot 0: a header and nothing behind it. Linux takes configuration mechanism
//! #1 for real only when it finds a function of this class.

use super::{Bar, ConfigSpace, Identity, PciFunction};

/// The function in slot 0.
pub struct HostBridge {
    space: ConfigSpace,
}

impl HostBridge {
    /// A bridge with an identity of Intel's for which Linux has no quirk.
    pub fn new() -> Self {
        Self {
            space: ConfigSpace::new(&Identity {
                vendor: 0x8086,
                device: 0x0d57,
                revision: 0,
                class: 0x06_00_00,
                subsystem_vendor: 0,
                subsystem: 0,
            }),
        }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        self.space.write(offset, data);
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn bar_read(&mut self, _index: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) {}
}
