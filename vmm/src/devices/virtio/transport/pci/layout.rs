//! Where things lie in the BAR.

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x4000;

/// Common configuration.
pub const COMMON: u64 = 0;
/// Its length.
pub const COMMON_SIZE: u64 = 0x40;
/// Interrupt status.
pub const ISR: u64 = 0x100;
/// Its length.
pub const ISR_SIZE: u64 = 4;
/// Device configuration.
pub const DEVICE: u64 = 0x200;
/// Its length; what lies past a device's own reads as zero.
pub const DEVICE_SIZE: u64 = 0xe00;
/// Notification addresses, one per queue.
pub const NOTIFY: u64 = 0x1000;
/// Their length.
pub const NOTIFY_SIZE: u64 = 0x1000;
/// Bytes from one queue's notification address to the next one's.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// MSI-X table.
pub const TABLE: u64 = 0x2000;
/// Its length.
pub const TABLE_SIZE: u64 = 0x1000;
/// MSI-X pending bits.
pub const PENDING: u64 = 0x3000;
/// Their length.
pub const PENDING_SIZE: u64 = 0x1000;

/// The most queues a device may have: each needs an MSI-X vector beside the configuration's.
pub const MAX_QUEUES: usize = 255;

/// A part of the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Common configuration.
    Common,
    /// Interrupt status.
    Isr,
    /// Device configuration.
    Device,
    /// Notification addresses.
    Notify,
    /// MSI-X table.
    Table,
    /// MSI-X pending bits.
    Pending,
}

/// The part in which an access of `len` bytes lies whole, and the offset within.
pub fn find(offset: u64, len: usize) -> Option<(Part, u64)> {
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    [
        (Part::Common, COMMON, COMMON_SIZE),
        (Part::Isr, ISR, ISR_SIZE),
        (Part::Device, DEVICE, DEVICE_SIZE),
        (Part::Notify, NOTIFY, NOTIFY_SIZE),
        (Part::Table, TABLE, TABLE_SIZE),
        (Part::Pending, PENDING, PENDING_SIZE),
    ]
    .into_iter()
    .find(|&(_, start, size)| offset >= start && end <= start + size)
    .map(|(part, start, _)| (part, offset - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_belongs_to_one_part_or_none() {
        assert_eq!(find(0, 4), Some((Part::Common, 0)));
        assert_eq!(find(0x3e, 2), Some((Part::Common, 0x3e)));
        assert_eq!(find(0x3e, 4), None);
        assert_eq!(find(0x1ffc, 4), Some((Part::Notify, 0xffc)));
        assert_eq!(find(0x1ffc, 8), None);
        assert_eq!(find(0x3ff8, 8), Some((Part::Pending, 0xff8)));
        assert_eq!(find(0x3ffc, 8), None);
        assert_eq!(find(u64::MAX, 8), None);
    }
}
