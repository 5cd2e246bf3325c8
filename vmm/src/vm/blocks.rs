//! Memory above what the guest was booted with, in blocks that come and go while it runs.
//!
//! ```text
//!              plug: accessible, a KVM slot, in the map of guest memory
//!   unplugged ◀─────────────────────────────────────────────────────────▶ plugged
//!              unplug: out of the slot and the map, pages given back
//! ```
//!
//! What is not plugged is in no slot, so a vCPU that touches it leaves the guest and finds no device;
//! and it is not in the map, so a descriptor that names it is refused.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion,
};

use super::memory::map_aligned;
use super::{GuestMemory, LiveMemory};
use crate::arch::x86_64::layout;

/// Bytes of a block: what Linux adds and takes away whole, its memory block on x86-64. It may make
/// that 2 GiB if it is booted with 64 GiB or more.
const BLOCK: u64 = 128 << 20;
const LARGE_BLOCK: u64 = 2 << 30;
const LARGE_MEMORY: u64 = 64 << 30;

/// Slots before this one are for the memory that the guest was booted with.
const FIRST_SLOT: u32 = 8;

/// 2 TiB; KVM has slots for 32764.
const MOST_BLOCKS: u64 = 16384;

/// Where blocks are in guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// The first address, a multiple of 2 GiB, which is Linux's largest memory block.
    pub base: u64,
    /// Bytes of a block.
    pub block: u64,
    /// How many blocks there can be.
    pub count: u64,
}

impl BlockRange {
    /// Room for `bytes` above `memory`, below the end of the processor's physical addresses; none if
    /// not even one block fits.
    pub fn above(memory: &GuestMemory, bytes: u64, address_bits: u32) -> Option<Self> {
        let end = memory.last_addr().0.saturating_add(1).max(layout::HOLE_END);
        let base = end.checked_next_multiple_of(LARGE_BLOCK)?;
        let limit = 1_u64.checked_shl(address_bits).unwrap_or(u64::MAX);
        let has: u64 = memory.iter().map(|region| region.len()).sum();
        let block = if has < LARGE_MEMORY { BLOCK } else { LARGE_BLOCK };
        let room = limit.saturating_sub(base) / block;
        let count = (bytes / block).min(room).min(MOST_BLOCKS);
        (count > 0).then_some(Self { base, block, count })
    }

    /// Bytes from the first address to the last.
    pub fn size(&self) -> u64 {
        self.count * self.block
    }

    /// Where block `index` begins.
    pub fn address(&self, index: u64) -> u64 {
        self.base + index * self.block
    }
}

/// Gives memory to blocks and takes it away; KVM in the machine, a mock in tests.
pub trait BlockBacking: Send {
    /// Gives memory, all zero, to the unplugged block `index` of the range.
    fn plug(&mut self, index: u64) -> io::Result<()>;
    /// Takes it from the plugged block `index`.
    fn unplug(&mut self, index: u64) -> io::Result<()>;
}

/// Blocks of a machine on KVM.
pub struct KvmBlocks {
    vm: Arc<VmFd>,
    live: LiveMemory,
    range: BlockRange,
    /// Addresses of ours for all blocks, without access until a block is plugged for the first time.
    /// Never unmapped.
    place: Option<MmapRegion<()>>,
}

impl KvmBlocks {
    /// Blocks at `range`, of which none is plugged; nothing is mapped yet.
    pub fn new(vm: Arc<VmFd>, live: LiveMemory, range: BlockRange) -> Self {
        Self { vm, live, range, place: None }
    }

    /// Where they are.
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// The first byte of the block here.
    fn host(&mut self, index: u64) -> io::Result<*mut u8> {
        if index >= self.range.count {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = match &mut self.place {
            Some(place) => place,
            empty => empty.insert(map_aligned(whole(self.range.size())?, libc::PROT_NONE)?),
        };
        // In the mapping: the index was checked above.
        Ok(place.as_ptr().wrapping_add(whole(index * self.range.block)?))
    }

    fn set_slot(&self, index: u64, size: u64, host: *mut u8) -> io::Result<()> {
        let slot = u32::try_from(index).map_err(io::Error::other)? + FIRST_SLOT;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: self.range.address(index),
            memory_size: size,
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the memory is mapped for good (`place`), and no other slot has it.
        Ok(unsafe { self.vm.set_user_memory_region(region) }?)
    }
}

impl BlockBacking for KvmBlocks {
    fn plug(&mut self, index: u64) -> io::Result<()> {
        let host = self.host(index)?;
        let (size, access) = (whole(self.range.block)?, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the block lies in the mapping of ours, of which nobody has a reference.
        if unsafe { libc::mprotect(host.cast(), size, access) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the block is mapped and accessible, and stays so for good.
        let region = unsafe { MmapRegion::build_raw(host, size, access, flags) };
        let region = region.map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, GuestAddress(self.range.address(index)))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let memory = self.live.now().insert_region(Arc::new(region)).map_err(io::Error::other)?;
        self.set_slot(index, self.range.block, host)?;
        self.live.replace(memory).or_else(|error| self.set_slot(index, 0, host).and(Err(error)))
    }

    fn unplug(&mut self, index: u64) -> io::Result<()> {
        let host = self.host(index)?;
        let address = GuestAddress(self.range.address(index));
        let removed = self.live.now().remove_region(address, self.range.block);
        let (memory, region) = removed.map_err(io::Error::other)?;
        // First who could write there without looking; then a slot of no size is none.
        self.live.replace(memory)?;
        self.set_slot(index, 0, host)?;
        let size = whole(region.len())?;
        // A request under way may still write here: that goes into pages of ours that no guest sees,
        // so the block stays accessible, and whoever plugs it again finds it as a guest's own
        // request left it.
        // SAFETY: the block is memory of guests, in the mapping of ours; its content may vanish.
        if unsafe { libc::madvise(host.cast(), size, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn whole(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::{InterruptChips, Kvm};
    use super::*;

    fn memory(mib: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    #[test]
    fn the_range_is_above_memory_and_below_the_processors_end() {
        let above = |bytes, bits| BlockRange::above(&memory(64), bytes, bits);
        let range = above(1 << 30, 48).unwrap();
        assert_eq!((range.base, range.count, range.size()), (4 << 30, 8, 1 << 30));
        assert_eq!(range.address(1), (4 << 30) + BLOCK);
        assert_eq!(above(BLOCK - 1, 48), None);
        assert_eq!(above(u64::MAX, 48).unwrap().count, MOST_BLOCKS);
        assert_eq!(above(64 << 30, 33).unwrap().count, 32, "8 GiB of addresses");
        assert_eq!(above(64 << 30, 32), None);
        let high = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
        let range = BlockRange::above(&GuestMemory::from_ranges(&high).unwrap(), 1 << 30, 48);
        assert_eq!(range.unwrap().base, 6 << 30);
    }

    #[test]
    fn blocks_are_in_the_map_while_they_are_plugged() {
        let Ok(file) = std::fs::File::options().read(true).write(true).open("/dev/kvm") else {
            return husk_skip::skipped("no /dev/kvm");
        };
        let vm = Kvm::new(file.into()).unwrap().create_vm(InterruptChips::None).unwrap();
        let live = LiveMemory::new(memory(1));
        let range = BlockRange { base: 4 << 30, block: BLOCK, count: 4 };
        let mut blocks = KvmBlocks::new(vm.fd().clone(), live.clone(), range);
        let second = GuestAddress(range.address(1));
        for _ in 0..2 {
            blocks.plug(1).unwrap();
            assert_eq!(live.now().read_obj::<u64>(second).unwrap(), 0);
            live.now().write_obj(7_u64, second).unwrap();
            assert!(blocks.plug(1).is_err(), "twice");
            assert!(!live.now().address_in_range(GuestAddress(range.address(0))));
            let held = live.now();
            blocks.unplug(1).unwrap();
            assert!(!live.now().address_in_range(second));
            // Who still looks there sees nothing, and comes to no harm.
            assert_eq!(held.read_obj::<u64>(second).unwrap(), 0);
            assert!(blocks.unplug(1).is_err(), "twice");
        }
        assert!(blocks.plug(4).is_err(), "outside");
    }
}
