//! The slots of bus 0, one function in each, and the addresses of their BARs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use super::{Bar, CONFIG_SIZE, PciFunction};

const SLOTS: usize = 32;
/// BARs are placed in whole pages, so that no two functions' registers share one.
const PAGE: u64 = 4096;

/// A function as the bus and the device's own event handler hold it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Why a function cannot go on the bus. A mistake of the machine's, never of the guest's.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus has no free slot of its {SLOTS}")]
    Full,
    /// A range lies outside the window for BARs or overlaps another.
    #[error("{0:?} overlaps another or leaves the window")]
    Bar(Bar),
    /// The window for BARs is full, or the size is not possible.
    #[error("no address for a BAR of {size} bytes")]
    Room {
        /// The size asked for.
        size: u64,
        /// What the allocator says.
        source: vm_allocator::Error,
    },
}

struct Slot {
    function: SharedFunction,
    /// Where the BARs are now.
    bars: Vec<Bar>,
    /// Where the machine has placed them.
    placed: Vec<Bar>,
}

struct Slots {
    slots: [Option<Slot>; SLOTS],
    addresses: AddressAllocator,
}

impl Slots {
    fn taken(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().flatten()
    }

    /// Whether a range touches one that the guest may have moved.
    fn is_covered(&self, start: u64, end: u64) -> bool {
        self.taken()
            .flat_map(|slot| &slot.bars)
            .any(|o| o.address < end && start < o.address + o.size)
    }

    fn free(&mut self, bar: &Bar) {
        let end = bar.address + bar.size.max(PAGE) - 1;
        // What has not come from the allocator is none of its business.
        if let Ok(range) = RangeInclusive::new(bar.address, end) {
            let _ = self.addresses.free(&range);
        }
    }
}

/// Bus 0.
pub struct PciBus {
    state: Mutex<Slots>,
    window: (u64, u64),
}

impl PciBus {
    /// An empty bus whose BARs lie in `size` bytes at guest-physical `base`.
    pub fn new(base: u64, size: u64) -> Result<Self, PciError> {
        let addresses =
            AddressAllocator::new(base, size).map_err(|source| PciError::Room { size, source })?;
        let slots = Slots { slots: [const { None }; SLOTS], addresses };
        Ok(Self { state: Mutex::new(slots), window: (base, base + size) })
    }

    /// A free, aligned range for a BAR of `size` bytes, which must be a power of two.
    pub fn allocate(&self, size: u64) -> Result<u64, PciError> {
        let mut state = self.lock();
        let aligned = size.max(PAGE);
        let mut covered = Vec::new();
        // The guest may have moved a range onto a free one: that is left out. It has few to move.
        let result = loop {
            let range = state
                .addresses
                .allocate(aligned, aligned, AllocPolicy::FirstMatch)
                .map_err(|source| PciError::Room { size, source });
            match range {
                Ok(range) if state.is_covered(range.start(), range.end() + 1) => {
                    covered.push(Bar { index: 0, address: range.start(), size: aligned });
                }
                other => break other.map(|range| range.start()),
            }
        };
        for bar in &covered {
            state.free(bar);
        }
        result
    }

    /// Gives back a range that no function was made for.
    pub fn release(&self, address: u64, size: u64) {
        self.lock().free(&Bar { index: 0, address, size });
    }

    /// Puts a function into the first free slot, which is returned.
    pub fn add(&self, function: SharedFunction) -> Result<u8, PciError> {
        let bars = function.lock().unwrap_or_else(PoisonError::into_inner).bars();
        let mut state = self.lock();
        let free = state.slots.iter().position(Option::is_none).ok_or(PciError::Full)?;
        let number = u8::try_from(free).map_err(|_| PciError::Full)?;
        for (position, bar) in bars.iter().enumerate() {
            let end = bar.address.checked_add(bar.size).ok_or(PciError::Bar(*bar))?;
            let inside = bar.address >= self.window.0 && end <= self.window.1;
            let mut others = bars[..position].iter();
            let overlaps = others.any(|o| o.address < end && bar.address < o.address + o.size);
            if !inside || overlaps || state.is_covered(bar.address, end) {
                return Err(PciError::Bar(*bar));
            }
        }
        state.slots[free] = Some(Slot { function, placed: bars.clone(), bars });
        Ok(number)
    }

    /// Takes the function out of a slot; its ranges are free again. A vCPU may be in a call of it
    /// that began before.
    pub fn remove(&self, slot: u8) -> Option<SharedFunction> {
        let mut state = self.lock();
        let slot = state.slots.get_mut(usize::from(slot))?.take()?;
        for bar in &slot.placed {
            state.free(bar);
        }
        Some(slot.function)
    }

    /// Reads configuration space; an empty slot and what passes 256 bytes read as all ones.
    pub fn config_read(&self, slot: u8, offset: u8, data: &mut [u8]) {
        data.fill(0xff);
        if usize::from(offset) + data.len() <= CONFIG_SIZE
            && let Some(function) = self.function(slot)
        {
            locked(&function).config_read(offset, data);
        }
    }

    /// Writes configuration space, under the same bounds.
    pub fn config_write(&self, slot: u8, offset: u8, data: &[u8]) {
        if usize::from(offset) + data.len() <= CONFIG_SIZE
            && let Some(function) = self.function(slot)
        {
            let bars = {
                let mut function = locked(&function);
                function.config_write(offset, data);
                function.bars()
            };
            // The slot may have been emptied, even filled again, meanwhile.
            if let Some(Some(slot)) = self.lock().slots.get_mut(usize::from(slot))
                && Arc::ptr_eq(&slot.function, &function)
            {
                slot.bars = bars;
            }
        }
    }

    /// Reads guest-physical `address`; outside all BARs, or across the end of one, all ones.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, index, offset)) = self.bar_at(address, data.len()) {
            locked(&function).bar_read(index, offset, data);
        }
    }

    /// Writes guest-physical `address`, under the same bounds.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((function, index, offset)) = self.bar_at(address, data.len()) {
            locked(&function).bar_write(index, offset, data);
        }
    }

    fn function(&self, slot: u8) -> Option<SharedFunction> {
        self.lock().slots.get(usize::from(slot))?.as_ref().map(|slot| slot.function.clone())
    }

    fn bar_at(&self, address: u64, length: usize) -> Option<(SharedFunction, u8, u64)> {
        let end = address.checked_add(u64::try_from(length).ok()?)?;
        let state = self.lock();
        state.taken().find_map(|slot| {
            let bar = slot
                .bars
                .iter()
                .find(|bar| bar.address <= address && end <= bar.address + bar.size)?;
            Some((slot.function.clone(), bar.index, address - bar.address))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A panic aborts the process in what we ship, so a poisoned lock is only seen in tests.
fn locked(function: &Mutex<dyn PciFunction>) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) struct Scratch {
        pub(crate) config: [u8; 256],
        pub(crate) bars: Vec<Bar>,
        pub(crate) memory: Vec<u8>,
    }

    impl PciFunction for Scratch {
        fn config_read(&mut self, offset: u8, data: &mut [u8]) {
            let offset = usize::from(offset);
            data.copy_from_slice(&self.config[offset..offset + data.len()]);
        }
        fn config_write(&mut self, offset: u8, data: &[u8]) {
            let offset = usize::from(offset);
            self.config[offset..offset + data.len()].copy_from_slice(data);
        }
        fn bars(&self) -> Vec<Bar> {
            self.bars.clone()
        }
        fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) {
            let offset = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.memory[offset..offset + data.len()]);
        }
        fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) {
            let offset = usize::try_from(offset).unwrap();
            self.memory[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    pub(crate) fn scratch(bars: &[Bar]) -> SharedFunction {
        Arc::new(Mutex::new(Scratch {
            config: [0x11; 256],
            bars: bars.to_vec(),
            memory: vec![0x22; 0x1000],
        }))
    }

    #[test]
    fn memory_accesses_stay_inside_bars() {
        let bus = PciBus::new(0xc000_0000, 0x10_0000).unwrap();
        let address = bus.allocate(0x1000).unwrap();
        bus.add(scratch(&[Bar { index: 0, address, size: 0x1000 }])).unwrap();
        let mut data = [0; 4];
        bus.memory_write(address + 0xffc, &[1, 2, 3, 4]);
        bus.memory_read(address + 0xffc, &mut data);
        assert_eq!(data, [1, 2, 3, 4]);
        bus.memory_read(address + 0xffd, &mut data);
        assert_eq!(data, [0xff; 4], "across the end");
        bus.memory_read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn configuration_accesses_stay_inside_the_space() {
        let bus = PciBus::new(0xc000_0000, 0x10_0000).unwrap();
        assert_eq!(bus.add(scratch(&[])).unwrap(), 0);
        let mut data = [0; 4];
        bus.config_read(0, 0xfc, &mut data);
        assert_eq!(data, [0x11; 4]);
        bus.config_read(0, 0xfd, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.config_read(1, 0, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.config_write(0, 0xff, &[1, 2]);
        bus.config_write(9, 0, &[1, 2]);
    }

    #[test]
    fn overlapping_and_stray_bars_are_refused() {
        let bus = PciBus::new(0xc000_0000, 0x10_0000).unwrap();
        let bar = |address| Bar { index: 0, address, size: 0x2000 };
        bus.add(scratch(&[bar(0xc000_0000)])).unwrap();
        for address in [0xc000_1000, 0xc00f_f000, 0xb000_0000, u64::MAX] {
            assert!(matches!(bus.add(scratch(&[bar(address)])), Err(PciError::Bar(_))));
        }
        assert!(bus.add(scratch(&[bar(0xc000_2000)])).is_ok());
    }

    #[test]
    fn what_is_removed_can_be_added_again() {
        let bus = PciBus::new(0xc000_0000, 0x4000).unwrap();
        for _ in 0..100 {
            let address = bus.allocate(0x4000).unwrap();
            assert_eq!(address, 0xc000_0000);
            let slot = bus.add(scratch(&[Bar { index: 0, address, size: 0x4000 }])).unwrap();
            assert!(bus.allocate(0x1000).is_err());
            assert!(bus.remove(slot).is_some());
            assert!(bus.remove(slot).is_none());
            let mut data = [0; 4];
            bus.memory_read(address, &mut data);
            assert_eq!(data, [0xff; 4]);
            bus.config_read(slot, 0, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        let address = bus.allocate(0x4000).unwrap();
        bus.release(address, 0x4000);
        assert!(bus.allocate(0x4000).is_ok());
        assert!(bus.remove(99).is_none());
    }

    #[test]
    fn moved_ranges_are_found_and_not_given_away() {
        let bus = PciBus::new(0xc000_0000, 0x4000).unwrap();
        let address = bus.allocate(0x1000).unwrap();
        let function = Arc::new(Mutex::new(Scratch {
            config: [0; 256],
            bars: vec![Bar { index: 0, address, size: 0x1000 }],
            memory: vec![0x22; 0x1000],
        }));
        let slot = bus.add(function.clone()).unwrap();
        for moved in [0x1000_0000, 0xc000_2000] {
            function.lock().unwrap().bars[0].address = moved;
            bus.config_write(slot, 0, &[0]);
            let mut data = [0; 4];
            bus.memory_read(moved, &mut data);
            assert_eq!(data, [0x22; 4]);
            bus.memory_read(address, &mut data);
            assert_eq!(data, [0xff; 4], "no longer there");
        }
        let others = [bus.allocate(0x1000).unwrap(), bus.allocate(0x1000).unwrap()];
        assert_eq!(others, [0xc000_1000, 0xc000_3000]);
        assert!(bus.allocate(0x1000).is_err());
        assert!(bus.remove(slot).is_some());
        assert!(bus.allocate(0x1000).is_ok());
        assert!(bus.allocate(0x1000).is_ok());
    }

    #[test]
    fn slots_and_addresses_run_out() {
        let bus = PciBus::new(0xc000_0000, 0x10_0000).unwrap();
        for slot in 0..32 {
            assert_eq!(bus.add(scratch(&[])).unwrap(), slot);
        }
        assert!(matches!(bus.add(scratch(&[])), Err(PciError::Full)));
        bus.allocate(0x10_0000).unwrap();
        assert!(matches!(bus.allocate(0x1000), Err(PciError::Room { .. })));
    }
}
