//! The device status register (virtio 1.2, section 2.1); the diagram is in the parent's docs.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

/// How far the driver has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing said yet.
    Reset,
    /// ACKNOWLEDGE: the guest has seen the device.
    Found,
    /// DRIVER: it has a driver for it.
    Driver,
    /// FEATURES_OK: features are settled.
    Agreed,
    /// DRIVER_OK: the device works.
    Live,
}

impl Phase {
    const ORDER: [Self; 5] = [Self::Reset, Self::Found, Self::Driver, Self::Agreed, Self::Live];

    fn bits(self) -> u32 {
        match self {
            Self::Reset => 0,
            Self::Found => VIRTIO_CONFIG_S_ACKNOWLEDGE,
            Self::Driver => Self::Found.bits() | VIRTIO_CONFIG_S_DRIVER,
            Self::Agreed => Self::Driver.bits() | VIRTIO_CONFIG_S_FEATURES_OK,
            Self::Live => Self::Agreed.bits() | VIRTIO_CONFIG_S_DRIVER_OK,
        }
    }
}

/// What a write to the register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Back to the beginning.
    Reset,
    /// One step forward, into this phase.
    Step(Phase),
    /// Nothing: as it stands, or given up.
    Stay,
    /// Something the driver may not ask for.
    Forbidden,
}

/// The register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    phase: Phase,
    failed: bool,
    needs_reset: bool,
}

impl Status {
    /// After reset.
    pub const RESET: Self = Self { phase: Phase::Reset, failed: false, needs_reset: false };

    /// How far the driver has come.
    pub fn phase(self) -> Phase {
        self.phase
    }

    /// What the driver reads.
    pub fn value(self) -> u8 {
        let mut bits = self.phase.bits();
        if self.failed {
            bits |= VIRTIO_CONFIG_S_FAILED;
        }
        if self.needs_reset {
            bits |= VIRTIO_CONFIG_S_NEEDS_RESET;
        }
        // All status bits lie in the low byte.
        bits.to_le_bytes()[0]
    }

    /// Judges a write; notes FAILED, everything else is for the caller to carry out.
    pub fn write(&mut self, value: u8) -> Wish {
        if value == 0 {
            return Wish::Reset;
        }
        let mut value = u32::from(value);
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.failed = true;
            value &= !VIRTIO_CONFIG_S_FAILED;
        }
        // The device sets this bit, the driver writes it back as it read it.
        value &= !VIRTIO_CONFIG_S_NEEDS_RESET;
        if value == self.phase.bits() || self.failed {
            return Wish::Stay;
        }
        let next = Phase::ORDER.into_iter().find(|&phase| phase > self.phase);
        match next {
            Some(next) if value == next.bits() => Wish::Step(next),
            _ => Wish::Forbidden,
        }
    }

    /// Takes the step judged before.
    pub fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// The device cannot go on.
    pub fn set_needs_reset(&mut self) {
        self.needs_reset = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_step_forward() {
        let mut status = Status::RESET;
        assert_eq!(status.write(2), Wish::Forbidden);
        assert_eq!(status.write(1), Wish::Step(Phase::Found));
        status.enter(Phase::Found);
        assert_eq!(status.write(11), Wish::Forbidden);
        assert_eq!(status.write(3), Wish::Step(Phase::Driver));
        status.enter(Phase::Driver);
        assert_eq!(status.write(7), Wish::Forbidden, "DRIVER_OK before FEATURES_OK");
        assert_eq!(status.write(11), Wish::Step(Phase::Agreed));
        status.enter(Phase::Agreed);
        assert_eq!(status.write(3), Wish::Forbidden, "backwards");
        assert_eq!(status.write(15), Wish::Step(Phase::Live));
        status.enter(Phase::Live);
        assert_eq!(status.write(15), Wish::Stay);
        assert_eq!(status.write(11), Wish::Forbidden);
        assert_eq!(status.write(0), Wish::Reset);
    }

    #[test]
    fn giving_up_is_for_good() {
        let mut status = Status::RESET;
        assert_eq!(status.write(1), Wish::Step(Phase::Found));
        status.enter(Phase::Found);
        assert_eq!(status.write(0x81), Wish::Stay);
        assert_eq!(status.value(), 0x81);
        assert_eq!(status.write(3), Wish::Stay);
        status.set_needs_reset();
        assert_eq!(status.value(), 0xc1);
    }
}
