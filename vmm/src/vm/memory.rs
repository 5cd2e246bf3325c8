//! Guest memory: private and anonymous, never filled beforehand, with a hole below 4 GiB.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion as _, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

use super::GuestMemory;
use crate::arch::x86_64::layout;

const MIB: u64 = 1 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// Why memory cannot be had or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// None, or so much that addresses run out.
    #[error("a machine cannot have {0} MiB of memory")]
    Size(u64),
    /// The host refuses.
    #[error("the host has no room for {mib} MiB of guest memory")]
    Allocate {
        /// How much was asked for.
        mib: u64,
        /// What the kernel says.
        source: io::Error,
    },
    /// The place does not lie in memory.
    #[error("{length:#x} bytes at guest address {address:#x} do not lie in memory")]
    Place {
        /// The guest-physical address.
        address: u64,
        /// How many bytes.
        length: u64,
        /// What vm-memory says.
        source: GuestMemoryError,
    },
    /// The file cannot be read.
    #[error("a file could not be read into guest memory")]
    File(#[source] io::Error),
}

/// Memory of that many MiB: from 0 on, the rest behind the hole.
pub fn allocate(mib: u64) -> Result<GuestMemory, MemoryError> {
    // 64 TiB is beyond every processor's physical addresses worth thinking of.
    if mib == 0 || mib > 1 << 26 {
        return Err(MemoryError::Size(mib));
    }
    let size = mib * MIB;
    let low = size.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), bytes(low)?)];
    if size > low {
        ranges.push((GuestAddress(layout::HOLE_END), bytes(size - low)?));
    }
    let regions = ranges
        .into_iter()
        .map(|(start, size)| {
            let region = map_aligned(size, libc::PROT_READ | libc::PROT_WRITE)
                .map_err(|source| MemoryError::Allocate { mib, source })?;
            GuestRegionMmap::new(region, start).ok_or(MemoryError::Size(mib))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::Size(mib))
}

/// Maps fresh memory that starts at a multiple of 2 MiB: only where host and guest addresses agree
/// in their low 21 bits can KVM map the host's huge pages whole, and each page it maps is an exit.
///
/// It is never unmapped: it goes with the process, in one piece with everything else.
pub(super) fn map_aligned(size: usize, prot: libc::c_int) -> io::Result<MmapRegion<()>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let whole = size.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing there is.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = start.cast::<u8>();
    let before = start.align_offset(HUGE_PAGE);
    let after = HUGE_PAGE - before;
    // SAFETY: both parts lie in the mapping just made (`before` is less than HUGE_PAGE), and nobody
    // has a pointer into them. The rest stays mapped for good, as `build_raw` asks.
    unsafe {
        let memory = start.add(before);
        if before > 0 {
            libc::munmap(start.cast(), before);
        }
        libc::munmap(memory.add(size).cast(), after);
        MmapRegion::build_raw(memory, size, prot, flags).map_err(io::Error::other)
    }
}

/// Reads `length` bytes of `file`, from `offset` on, into memory at guest-physical `address`, into huge
/// pages if the host has them: each page that KVM maps is an exit.
///
/// Nothing is mapped from the file. As it starts, a kernel patches nearly every page of its code, and
/// pages of a file would be copied then, one exit each.
pub fn read_file(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), MemoryError> {
    let place = |source| MemoryError::Place { address, length, source };
    let length = bytes(length)?;
    let slice = memory.get_slice(GuestAddress(address), length).map_err(place)?;
    if length == 0 {
        return Ok(());
    }
    advise_huge(memory, address, length);
    let target = slice.ptr_guard_mut().as_ptr();
    // SAFETY: `slice` proves that so many bytes are mapped and writable, and no vCPU runs yet that
    // could look at them.
    let target = unsafe { std::slice::from_raw_parts_mut(target, length) };
    file.read_exact_at(target, offset).map_err(MemoryError::File)
}

/// Asks for huge pages round a range that will be filled; a host without them says no, and that is
/// no harm.
fn advise_huge(memory: &GuestMemory, address: u64, length: usize) {
    let Some(region) = memory.find_region(GuestAddress(address)) else { return };
    // Both ends stay in the region, which starts at a multiple of the huge page's size.
    let huge = HUGE_PAGE as u64;
    let start = (address - region.start_addr().0) / huge * huge;
    let end = address - region.start_addr().0 + length as u64;
    let end = end.next_multiple_of(huge).min(region.len());
    let Ok(whole) = bytes(end - start) else { return };
    let Ok(slice) = region.get_slice(MemoryRegionAddress(start), whole) else { return };
    // SAFETY: `slice` proves that the range is mapped; advice changes no content.
    unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), whole, libc::MADV_HUGEPAGE) };
}

fn bytes(count: u64) -> Result<usize, MemoryError> {
    usize::try_from(count).map_err(|_| MemoryError::Size(count / MIB))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn has_a_hole_below_four_gib() {
        let regions = |mib| -> Vec<(u64, u64)> {
            let memory = allocate(mib).unwrap();
            memory.iter().map(|r| (r.start_addr().0, r.len())).collect()
        };
        assert_eq!(regions(256), [(0, 256 << 20)]);
        assert_eq!(regions(3072), [(0, 3 << 30)]);
        assert_eq!(regions(5000), [(0, 3 << 30), (4 << 30, (5000 - 3072) << 20)]);
        assert!(matches!(allocate(0), Err(MemoryError::Size(0))));
        assert!(matches!(allocate(u64::MAX), Err(MemoryError::Size(_))));
    }

    #[test]
    fn files_are_read_to_their_place() {
        // The end of memory is no multiple of a huge page.
        let memory = allocate(5).unwrap();
        let content: Vec<u8> = (0..3 * 4096 + 100_u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let check = |offset: usize, address: u64, length: usize| {
            read_file(&memory, &file, offset as u64, address, length as u64).unwrap();
            let mut read = vec![0; length + 1];
            memory.read_slice(&mut read, GuestAddress(address)).unwrap();
            assert_eq!(read[..length], content[offset..offset + length]);
            assert_eq!(read[length], 0, "nothing behind it");
        };
        check(0, 0x10_0000, content.len());
        check(1, 0x30_0001, 5000);
        check(4096, 0x4f_0000, 8200);
        check(0, 0x20_0000, 0);
        let long = read_file(&memory, &file, 0, 0x10_0000, 1 << 20);
        assert!(matches!(long, Err(MemoryError::File(_))), "{long:?}");
    }

    #[test]
    fn places_outside_memory_are_refused() {
        let memory = allocate(1).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (address, length) in [(0x10_0000, 4096), (0xf_f000, 8192), (u64::MAX, 2)] {
            let result = read_file(&memory, &file, 0, address, length);
            assert!(matches!(result, Err(MemoryError::Place { .. })), "{address:#x}");
        }
    }
}
