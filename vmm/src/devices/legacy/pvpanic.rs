//! pvpanic on PCI: the guest's kernel says that it panicked (QEMU `docs/specs/pvpanic.rst`).

use std::sync::Arc;

use husk_control::EndReason;
use serde::{Deserialize, Serialize};

use super::LegacyStateError;
use crate::bus::pci::{
    Bar, ConfigSpace, ConfigSpaceError, ConfigSpaceState, Identity, PciFunction,
};
use crate::machine::EndSignal;

const PANICKED: u8 = 1;
const STATE_VERSION: u16 = 1;

/// The function 1b36:0011 with one byte of events.
pub struct PvPanic {
    space: ConfigSpace,
    end: Arc<EndSignal>,
}

/// What a guest can have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvPanicState {
    version: u16,
    space: ConfigSpaceState,
}

impl PvPanic {
    /// Bytes its BAR takes.
    pub const BAR_SIZE: u64 = 4096;

    /// The device with its BAR at `address`; panics are told to `end`.
    pub fn new(address: u64, end: Arc<EndSignal>) -> Result<Self, ConfigSpaceError> {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            class: 0x08_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.add_bar(Bar { index: 0, address, size: Self::BAR_SIZE })?;
        Ok(Self { space, end })
    }

    /// The state.
    pub fn save(&self) -> PvPanicState {
        PvPanicState { version: STATE_VERSION, space: self.space.save() }
    }

    /// Puts a state back.
    pub fn restore(&mut self, state: &PvPanicState) -> Result<(), LegacyStateError> {
        let refused = LegacyStateError { device: "pvpanic", version: state.version };
        if state.version != STATE_VERSION {
            return Err(refused);
        }
        self.space.restore(&state.space).map_err(|_| refused)
    }
}

impl PciFunction for PvPanic {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        self.space.write(offset, data);
    }

    fn bars(&self) -> Vec<Bar> {
        self.space.bars()
    }

    fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
        // Which events are supported.
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED;
        }
    }

    fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
        if offset == 0 && data.first().is_some_and(|events| events & PANICKED != 0) {
            self.end.end(EndReason::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> (PvPanic, Arc<EndSignal>) {
        let end = Arc::new(EndSignal::new().unwrap());
        (PvPanic::new(0xc000_0000, end.clone()).unwrap(), end)
    }

    #[test]
    fn tells_a_panic() {
        let (mut device, end) = device();
        let mut events = [0xff];
        device.bar_read(0, 0, &mut events);
        assert_eq!(events, [PANICKED]);
        device.bar_write(0, 1, &[PANICKED]);
        device.bar_write(0, 0, &[2]);
        device.bar_write(0, 0, &[]);
        assert!(!end.has_ended());
        device.bar_write(0, 0, &[PANICKED]);
        assert_eq!(end.reason(), Some(EndReason::Panicked));
    }

    #[test]
    fn state_survives_a_round_trip() {
        let (mut device, _) = device();
        device.config_write(4, &[2, 0]);
        let text = serde_json::to_string(&device.save()).unwrap();
        let (mut other, _) = super::tests::device();
        other.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(other.save(), device.save());
        let mut state = device.save();
        state.version = 7;
        assert!(other.restore(&state).is_err());
    }
}
