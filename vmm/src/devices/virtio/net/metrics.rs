//! What has passed.

/// Counters of one direction, in frames and bytes without their virtio headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Direction {
    /// Frames.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Frames that were dropped.
    pub drops: u64,
}

/// Counters of a device since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// To the guest.
    pub received: Direction,
    /// From the guest.
    pub sent: Direction,
}

impl Direction {
    /// A frame has passed.
    pub fn count(&mut self, bytes: usize) {
        self.packets += 1;
        // A u64 holds every usize.
        self.bytes += bytes as u64;
    }
}
