//! Guest memory: private and anonymous, never filled beforehand, with a hole below 4 GiB.

use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError, GuestRegionMmap, MmapRegion};

use super::GuestMemory;
use crate::arch::x86_64::layout;

const PAGE: u64 = 4096;
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
    /// The file cannot be read or mapped.
    #[error("a file could not be mapped into guest memory")]
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
            let region =
                map_aligned(size).map_err(|source| MemoryError::Allocate { mib, source })?;
            GuestRegionMmap::new(region, start).ok_or(MemoryError::Size(mib))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::Size(mib))
}

/// Maps fresh memory that starts at a multiple of 2 MiB: only where host and guest addresses agree
/// in their low 21 bits can KVM map the host's huge pages whole, and each page it maps is an exit.
///
/// It is never unmapped: it goes with the process, in one piece with everything else.
fn map_aligned(size: usize) -> io::Result<MmapRegion<()>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
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

/// Maps `length` bytes of `file`, from `offset` on, privately over guest-physical `address`: the page
/// cache's own pages, until the guest writes. Both places must be multiples of 4096; the part of a
/// page at the end is copied.
///
/// The caller has checked that the file is long enough: what lies behind its end would end the
/// machine when touched.
pub fn map_file(
    memory: &GuestMemory,
    file: &File,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<(), MemoryError> {
    let place = |source| MemoryError::Place { address, length, source };
    let slice = memory.get_slice(GuestAddress(address), bytes(length)?).map_err(place)?;
    if !offset.is_multiple_of(PAGE) || !address.is_multiple_of(PAGE) {
        return Err(MemoryError::File(io::ErrorKind::InvalidInput.into()));
    }
    let mapped = length / PAGE * PAGE;
    if mapped > 0 {
        let target = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `slice` proves that the range is mapped, writable and inside one region of guest
        // memory, which owns it; the new pages take the place of its own and go with them.
        unsafe {
            map(
                target,
                bytes(mapped)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | libc::MAP_POPULATE,
                file,
                offset,
            )
        }?;
    }
    copy_file(memory, file, offset + mapped, address + mapped, length - mapped)
}

/// Copies `length` bytes of `file`, from `offset` on, to guest-physical `address`, into huge pages if
/// the host has them. For what the guest changes anyway, as its kernel's code: page by page that
/// would cost two exits and the copy as well.
///
/// The caller has checked that the file is long enough.
pub fn copy_file(
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
    let target = slice.ptr_guard_mut().as_ptr();
    let within = bytes(offset % PAGE)?;
    let (start, whole) = (offset - within as u64, length + within);
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing there is.
    let source = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_POPULATE;
        map(std::ptr::null_mut(), whole, libc::PROT_READ, flags, file, start)
    }?;
    // SAFETY: `source` is `whole` bytes long and ours alone; `slice` proves the same of the target,
    // and no vCPU runs yet. The mapping goes right after, nobody keeps a pointer into it.
    unsafe {
        advise_huge(target, length);
        stream(source.add(within), target, length);
        libc::munmap(source.cast(), whole);
    }
    Ok(())
}

/// Maps `length` bytes of `file`.
///
/// # Safety
///
/// As for `mmap(2)`: with `MAP_FIXED`, what lies at `target` goes.
unsafe fn map(
    target: *mut u8,
    length: usize,
    prot: i32,
    flags: i32,
    file: &File,
    offset: u64,
) -> Result<*mut u8, MemoryError> {
    let offset = i64::try_from(offset).map_err(|e| MemoryError::File(io::Error::other(e)))?;
    // SAFETY: the caller's.
    let start = unsafe { libc::mmap(target.cast(), length, prot, flags, file.as_raw_fd(), offset) };
    if start == libc::MAP_FAILED {
        return Err(MemoryError::File(io::Error::last_os_error()));
    }
    Ok(start.cast())
}

/// Copies past the caches: megabytes that nobody reads again on this processor soon. (And `memcpy`
/// counts a byte as an instruction where it decides for `rep movsb`.)
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
unsafe fn stream(source: *const u8, target: *mut u8, length: usize) {
    const LINE: usize = 64;
    let lines = if target.addr().is_multiple_of(16) { length / LINE } else { 0 };
    // SAFETY: the caller's; every access lies in the first `lines * LINE` bytes of both, the loads
    // need no alignment and the stores have it. SSE2 is part of x86-64.
    unsafe {
        for line in 0..lines {
            let from = source.add(line * LINE).cast::<__m128i>();
            let to = target.add(line * LINE).cast::<__m128i>();
            for part in 0..4 {
                _mm_stream_si128(to.add(part), _mm_loadu_si128(from.add(part)));
            }
        }
        _mm_sfence();
        let done = lines * LINE;
        std::ptr::copy_nonoverlapping(source.add(done), target.add(done), length - done);
    }
}

/// Asks for huge pages round a range that will be filled; a host without them says no, and that is
/// no harm.
///
/// # Safety
///
/// The range must be mapped, with 2 MiB round it in the same mapping wherever it is not aligned.
unsafe fn advise_huge(start: *mut u8, length: usize) {
    let before = start.addr() % HUGE_PAGE;
    let length = (before + length).next_multiple_of(HUGE_PAGE);
    // SAFETY: the caller's; advice changes no content.
    unsafe { libc::madvise(start.sub(before).cast(), length, libc::MADV_HUGEPAGE) };
}

fn bytes(count: u64) -> Result<usize, MemoryError> {
    usize::try_from(count).map_err(|_| MemoryError::Size(count / MIB))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryRegion as _};

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
    fn files_are_mapped_and_copied() {
        let memory = allocate(4).unwrap();
        let content: Vec<u8> = (0..3 * 4096 + 100_u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let check = |map: bool, offset: usize, address: u64, length: usize| {
            let put = if map { map_file } else { copy_file };
            put(&memory, &file, offset as u64, address, length as u64).unwrap();
            let mut read = vec![0; length + 1];
            memory.read_slice(&mut read, GuestAddress(address)).unwrap();
            assert_eq!(read[..length], content[offset..offset + length]);
            assert_eq!(read[length], 0, "nothing behind it");
        };
        check(true, 0, 0x10_0000, content.len());
        check(true, 4096, 0x20_0000, 2 * 4096);
        check(true, 8192, 0x20_4000, 50);
        check(false, 1, 0x30_0001, 5000);
        check(false, 4096, 0x30_8000, 8200);
        assert!(map_file(&memory, &file, 1, 0x30_0000, 4096).is_err());
        memory.write_slice(b"mine", GuestAddress(0x10_0000)).unwrap();
        let mut first = [0; 4];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, content[..4], "the file stays as it is");
    }

    #[test]
    fn places_outside_memory_are_refused() {
        let memory = allocate(1).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (address, length) in [(0x10_0000, 4096), (0xf_f000, 8192), (u64::MAX, 2)] {
            let result = copy_file(&memory, &file, 0, address, length);
            assert!(matches!(result, Err(MemoryError::Place { .. })), "{address:#x}");
        }
    }
}
