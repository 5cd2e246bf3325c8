//! A queue as the driver configures it.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory as _};

use super::msix::NO_VECTOR;
use crate::devices::virtio::state::QueuePosition;
use crate::vm::GuestMemory;

/// Registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueRegisters {
    /// Largest size, fixed by the device.
    pub max_size: u16,
    /// Size: a power of two up to the largest.
    pub size: u16,
    /// MSI-X vector.
    pub vector: u16,
    /// In use, and frozen till the next reset.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring ("driver area").
    pub available: u64,
    /// Address of the used ring ("device area").
    pub used: u64,
}

/// Why a queue cannot be used as the driver configured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A ring breaks its alignment.
    #[error("a ring is not aligned")]
    Alignment,
    /// A ring lies outside memory.
    #[error("a ring lies outside memory")]
    Outside,
    /// The size is no power of two up to the largest. Only a bad saved state can have it.
    #[error("impossible size")]
    Size,
}

impl QueueRegisters {
    /// After reset.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    /// The driver chooses a size; whether it can be had.
    pub fn set_size(&mut self, size: u16) -> bool {
        let good = size.is_power_of_two() && size <= self.max_size;
        if good {
            self.size = size;
        }
        good
    }

    /// The size, the alignment of each ring (virtio 1.2, section 2.7) and its place in memory.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > self.max_size {
            return Err(QueueError::Size);
        }
        let size = usize::from(self.size);
        for (address, alignment, len) in [
            (self.descriptors, 16, 16 * size),
            (self.available, 2, 6 + 2 * size),
            (self.used, 4, 6 + 8 * size),
        ] {
            if !address.is_multiple_of(alignment) {
                return Err(QueueError::Alignment);
            }
            if !memory.check_range(GuestAddress(address), len) {
                return Err(QueueError::Outside);
            }
        }
        Ok(())
    }

    /// The queue for the device, standing at `position`.
    pub fn build(&self, event_idx: bool, position: QueuePosition) -> Result<Queue, QueueError> {
        let state = QueueState {
            max_size: self.max_size,
            next_avail: position.next_avail,
            next_used: position.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        Queue::try_from(state).map_err(|_| QueueError::Size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> QueueRegisters {
        QueueRegisters {
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            ..QueueRegisters::new(64)
        }
    }

    #[test]
    fn rings_must_be_aligned_and_in_memory() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        assert_eq!(registers().check(&memory), Ok(()));
        let check = |change: fn(&mut QueueRegisters)| {
            let mut queue = registers();
            change(&mut queue);
            queue.check(&memory)
        };
        assert_eq!(check(|q| q.descriptors += 8), Err(QueueError::Alignment));
        assert_eq!(check(|q| q.available += 1), Err(QueueError::Alignment));
        assert_eq!(check(|q| q.used += 2), Err(QueueError::Alignment));
        assert_eq!(check(|q| q.descriptors = 0xfc10), Err(QueueError::Outside));
        assert_eq!(check(|q| q.descriptors = 0xfc00), Ok(()), "up to the last byte");
        assert_eq!(check(|q| q.used = u64::MAX - 3), Err(QueueError::Outside));
        assert_eq!(check(|q| q.available = 1 << 40), Err(QueueError::Outside));
    }

    #[test]
    fn sizes_are_powers_of_two_up_to_the_largest() {
        let mut queue = registers();
        for bad in [0, 3, 65, 128, u16::MAX] {
            assert!(!queue.set_size(bad));
            assert_eq!(queue.size, 64);
        }
        assert!(queue.set_size(16));
        assert_eq!(queue.size, 16);
    }
}
