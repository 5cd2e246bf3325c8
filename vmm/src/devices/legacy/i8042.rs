//! The keyboard controller, of which only the reset line is left: Linux's `reboot=k`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::LegacyStateError;
use crate::bus::BusDevice;
use crate::machine::EndSignal;

const COMMAND: u64 = 4;
const PULSE_RESET: u8 = 0xfe;
const STATE_VERSION: u16 = 1;

/// Ports 0x60 to 0x64.
pub struct I8042 {
    end: Arc<EndSignal>,
}

/// Nothing in it can change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    version: u16,
}

impl I8042 {
    /// The first port.
    pub const BASE: u64 = 0x60;
    /// How many ports there are.
    pub const LENGTH: u64 = 5;

    /// A controller whose reset line is `end`.
    pub fn new(end: Arc<EndSignal>) -> Self {
        Self { end }
    }

    /// The state.
    pub fn save(&self) -> I8042State {
        I8042State { version: STATE_VERSION }
    }

    /// Puts a state back.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), LegacyStateError> {
        match state.version {
            STATE_VERSION => Ok(()),
            version => Err(LegacyStateError { device: "i8042", version }),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Status: both buffers empty, so nobody waits. Data: nothing. The ports between (speaker,
        // NMI status) are not there.
        data.fill(if offset == COMMAND || offset == 0 { 0 } else { 0xff });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.end.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use husk_control::EndReason;

    use super::*;

    #[test]
    fn resets_on_the_one_command() {
        let end = Arc::new(EndSignal::new().unwrap());
        let mut device = I8042::new(end.clone());
        let mut status = [0xff];
        device.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
        device.write(0, &[PULSE_RESET]);
        device.write(COMMAND, &[0xd1]);
        device.write(COMMAND, &[PULSE_RESET, 0]);
        assert!(!end.has_ended());
        device.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(end.reason(), Some(EndReason::Reset));
    }

    #[test]
    fn state_survives_a_round_trip() {
        let mut device = I8042::new(Arc::new(EndSignal::new().unwrap()));
        let text = serde_json::to_string(&device.save()).unwrap();
        device.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert!(device.restore(&I8042State { version: 0 }).is_err());
    }
}
