//! Configuration mechanism #1: an address port (0xcf8) and a data port (0xcfc).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PciBus;
use crate::bus::BusDevice;

const ENABLE: u32 = 1 << 31;
const DATA: u64 = 4;
const STATE_VERSION: u16 = 1;

/// The eight ports from 0xcf8 on.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: u32,
}

/// What a guest can have changed in the ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigPortsState {
    version: u16,
    address: u32,
}

impl ConfigPorts {
    /// The first port.
    pub const BASE: u64 = 0xcf8;
    /// How many ports there are.
    pub const LENGTH: u64 = 8;
    /// The first of them, which only take an address: a write changes nothing outside.
    pub const ADDRESS_LENGTH: u32 = 4;

    /// The ports before `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: 0 }
    }

    /// The address register.
    pub fn save(&self) -> ConfigPortsState {
        ConfigPortsState { version: STATE_VERSION, address: self.address }
    }

    /// Puts the address register back; false if the state is of another version.
    pub fn restore(&mut self, state: &ConfigPortsState) -> bool {
        let known = state.version == STATE_VERSION;
        if known {
            self.address = state.address;
        }
        known
    }

    /// The slot and the register that `offset` within the data port means now, if there is one:
    /// bus 0, function 0.
    fn target(&self, offset: u64) -> Option<(u8, u8)> {
        let [register, function, bus, _] = self.address.to_le_bytes();
        let within = u8::try_from(offset.checked_sub(DATA)?).ok()?;
        if self.address & ENABLE == 0 || bus != 0 || function & 7 != 0 || within > 3 {
            return None;
        }
        Some((function >> 3, (register & !3) + within))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if let Some((slot, register)) = self.target(offset)
            && data.len() <= 4
        {
            self.bus.config_read(slot, register, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            // Narrower writes here are not the address register's (Linux probes with one).
            if let Ok(bytes) = data.try_into() {
                self.address = u32::from_le_bytes(bytes);
            }
        } else if let Some((slot, register)) = self.target(offset)
            && data.len() <= 4
        {
            self.bus.config_write(slot, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::tests::scratch;
    use super::*;

    fn ports() -> ConfigPorts {
        let bus = PciBus::new(0xc000_0000, 0x10_0000).unwrap();
        bus.add(scratch(&[])).unwrap();
        bus.add(scratch(&[])).unwrap();
        ConfigPorts::new(Arc::new(bus))
    }

    #[test]
    fn dwords_words_and_bytes_reach_their_register() {
        let mut ports = ports();
        ports.write(0, &0x8000_0810_u32.to_le_bytes());
        ports.write(4, &[1, 2, 3, 4]);
        ports.write(6, &[9]);
        let mut data = [0; 2];
        ports.read(6, &mut data);
        assert_eq!(data, [9, 4]);
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(data, 0x8000_0810_u32.to_le_bytes());
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let mut ports = ports();
        for address in [0x0000_0800_u32, 0x8001_0000, 0x8000_0100, 0x8000_1000] {
            ports.write(0, &address.to_le_bytes());
            ports.write(4, &[0; 4]);
            let mut data = [0; 4];
            ports.read(4, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let mut ports = ports();
        ports.write(0, &0x8000_08fc_u32.to_le_bytes());
        let mut data = [0; 8];
        for offset in 0..8 {
            for length in [1, 2, 4, 8] {
                ports.read(offset, &mut data[..length]);
                ports.write(offset, &data[..length]);
            }
        }
        ports.write(3, &[1]);
    }

    #[test]
    fn state_survives_a_round_trip() {
        let mut ports = ports();
        ports.write(0, &0x8000_0810_u32.to_le_bytes());
        let text = serde_json::to_string(&ports.save()).unwrap();
        let mut state: ConfigPortsState = serde_json::from_str(&text).unwrap();
        let mut other = super::tests::ports();
        assert!(other.restore(&state));
        assert_eq!(other.save(), ports.save());
        state.version = 2;
        assert!(!other.restore(&state));
    }
}
