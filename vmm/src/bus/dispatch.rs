//! Finds the device behind a port or an address.

use std::sync::{Arc, Mutex, PoisonError};

use super::BusDevice;

/// A device as a bus and its event handler hold it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Two devices would answer for the same place, or a range is empty or wraps. A mistake of the
/// machine's, never of the guest's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("bus range {base:#x}+{length:#x} is empty, wraps, or overlaps another")]
pub struct BusError {
    base: u64,
    length: u64,
}

struct Range {
    base: u64,
    length: u64,
    device: SharedDevice,
}

/// Devices by address, sorted. It is complete before the first vCPU runs, and shared unchanged.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` behind `length` addresses from `base` on.
    pub fn insert(&mut self, base: u64, length: u64, device: SharedDevice) -> Result<(), BusError> {
        let refused = BusError { base, length };
        let Some(end) = base.checked_add(length) else { return Err(refused) };
        let position = self.ranges.partition_point(|range| range.base < base);
        let before = position.checked_sub(1).map(|before| &self.ranges[before]);
        let clear_before = before.is_none_or(|range| range.base + range.length <= base);
        let clear_after = self.ranges.get(position).is_none_or(|range| end <= range.base);
        if length == 0 || !clear_before || !clear_after {
            return Err(refused);
        }
        self.ranges.insert(position, Range { base, length, device });
        Ok(())
    }

    /// The guest reads; where no device is, and across the end of one, it gets all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// The guest writes; where no device is, and across the end of one, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&SharedDevice, u64)> {
        let position = self.ranges.partition_point(|range| range.base <= address);
        let range = &self.ranges[position.checked_sub(1)?];
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= range.length).then_some((&range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<u8>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let offset = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[offset..offset + data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            let offset = usize::try_from(offset).unwrap();
            self.0[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    fn echo(length: usize) -> SharedDevice {
        Arc::new(Mutex::new(Echo(vec![0; length])))
    }

    #[test]
    fn finds_the_device_and_nothing_beside_it() {
        let mut bus = Bus::new();
        bus.insert(0x60, 5, echo(5)).unwrap();
        bus.insert(0x10, 4, echo(4)).unwrap();
        bus.write(0x60, &[7]);
        let mut data = [0];
        bus.read(0x60, &mut data);
        assert_eq!(data, [7]);
        for outside in [0, 0xf, 0x14, 0x5f, 0x65, u64::MAX] {
            bus.read(outside, &mut data);
            assert_eq!(data, [0xff], "{outside:#x}");
            bus.write(outside, &[1]);
        }
        let mut wide = [0; 8];
        bus.read(0x60, &mut wide);
        assert_eq!(wide, [0xff; 8], "across the end");
    }

    #[test]
    fn refuses_overlap() {
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, echo(1)).unwrap();
        for (base, length) in
            [(0x100, 1), (0xff, 2), (0x10f, 1), (0xf0, 0x40), (0x200, 0), (u64::MAX, 2)]
        {
            assert!(bus.insert(base, length, echo(1)).is_err(), "{base:#x}");
        }
        bus.insert(0x110, 1, echo(1)).unwrap();
        bus.insert(0xff, 1, echo(1)).unwrap();
    }
}
