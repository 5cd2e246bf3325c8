//! The kernel (an uncompressed ELF file) and the initial RAM file system, from their descriptors.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

use super::GuestMemory;
use super::memory::{MemoryError, read_file};
use crate::arch::x86_64::{Initrd, layout};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 64;
const LOADABLE: u32 = 1;
const CLASS_64_LITTLE: [u8; 2] = [2, 1];
const EXECUTABLE: u16 = 2;
const X86_64: u16 = 62;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// What a kernel needs beside its own image before it can say that memory ran out.
const WORKING_MEMORY: u64 = 16 * MIB;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Another kind of file.
    #[error(
        "the kernel is not an ELF file: give an uncompressed vmlinux (a distribution's vmlinuz \
         must be unpacked first)"
    )]
    NotElf,
    /// ELF, but for something else.
    #[error("the kernel is not an x86-64 ELF executable: {0}")]
    Unsuitable(&'static str),
    /// Headers that make no sense.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// The file cannot be read.
    #[error("the kernel file cannot be read")]
    Read(#[source] io::Error),
    /// The machine is too small for it.
    #[error("{has} MiB of memory is too little for this kernel: it needs at least {needs}")]
    TooLittleMemory {
        /// MiB there are.
        has: u64,
        /// MiB it takes.
        needs: u64,
    },
    /// A part of it cannot be put into memory.
    #[error("the kernel cannot be loaded")]
    Place(#[from] MemoryError),
}

/// Why an initial RAM file system cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file cannot be read.
    #[error("the initrd cannot be read")]
    Read(#[source] io::Error),
    /// Nothing in it.
    #[error("the initrd is empty: give the file that `make guest` built")]
    Empty,
    /// It would overlap the kernel.
    #[error("the initrd of {size} MiB and the kernel do not fit into {has} MiB of memory")]
    TooLarge {
        /// MiB the initrd takes.
        size: u64,
        /// MiB of memory below the hole.
        has: u64,
    },
    /// It cannot be put into memory.
    #[error("the initrd cannot be loaded")]
    Place(#[from] MemoryError),
}

/// A kernel file whose headers are checked.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    entry: u64,
    segments: Vec<Segment>,
    end: u64,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
}

impl Kernel {
    /// Reads the headers.
    pub fn open(file: File) -> Result<Self, KernelError> {
        let length = file.metadata().map_err(KernelError::Read)?.len();
        let mut header = [0; HEADER];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(KernelError::NotElf);
            }
            Err(error) => return Err(KernelError::Read(error)),
            Ok(()) => {}
        }
        if header[..4] != *b"\x7fELF" {
            return Err(KernelError::NotElf);
        }
        if header[4..6] != CLASS_64_LITTLE || u16_at(&header, 18) != X86_64 {
            return Err(KernelError::Unsuitable("it is for another processor"));
        }
        if u16_at(&header, 16) != EXECUTABLE {
            return Err(KernelError::Unsuitable("it is a library or an object file"));
        }
        let entry = u64_at(&header, 24);
        let count = u16_at(&header, 56);
        if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
            return Err(KernelError::Damaged("its program headers have another size or number"));
        }
        let mut headers = vec![0; PROGRAM_HEADER * usize::from(count)];
        file.read_exact_at(&mut headers, u64_at(&header, 32))
            .map_err(|_| KernelError::Damaged("it ends before its program headers"))?;
        let mut segments = Vec::new();
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            if let Some(segment) = Segment::parse(header, length)? {
                segments.push(segment);
            }
        }
        let end = segments.iter().map(|s| s.address + s.in_memory).max().unwrap_or(0);
        let entered = |s: &Segment| (s.address..s.address + s.in_file).contains(&entry);
        if !segments.iter().any(entered) {
            return Err(KernelError::Damaged("its entry point lies in none of its segments"));
        }
        Ok(Self { file, entry, segments, end })
    }

    /// The guest-physical address of the 64-bit entry point.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The guest-physical address behind its last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// MiB of memory without which it is not worth starting with an initrd of `initrd` bytes,
    /// which is there twice while it is unpacked.
    pub fn least_memory(&self, initrd: u64) -> u64 {
        self.end
            .saturating_add(initrd.saturating_mul(2))
            .saturating_add(WORKING_MEMORY)
            .div_ceil(MIB)
    }

    /// Reads it into memory, which is fresh: what the file does not fill is zero already.
    pub fn load(&self, memory: &GuestMemory, initrd: u64) -> Result<(), KernelError> {
        let has = memory.iter().map(|region| region.len()).sum::<u64>() / MIB;
        let needs = self.least_memory(initrd);
        if has < needs || self.end > low_end(memory) {
            return Err(KernelError::TooLittleMemory { has, needs });
        }
        for segment in &self.segments {
            read_file(memory, &self.file, segment.offset, segment.address, segment.in_file)?;
        }
        Ok(())
    }
}

impl Segment {
    /// A program header's segment, if it is to be loaded; inside the file and above the first MiB.
    fn parse(header: &[u8], length: u64) -> Result<Option<Self>, KernelError> {
        let segment = Self {
            offset: u64_at(header, 8),
            address: u64_at(header, 24),
            in_file: u64_at(header, 32),
            in_memory: u64_at(header, 40),
        };
        if u32_at(header, 0) != LOADABLE || segment.in_memory == 0 {
            return Ok(None);
        }
        if segment.in_file > segment.in_memory {
            return Err(KernelError::Damaged("a segment is larger in the file than in memory"));
        }
        if segment.offset.checked_add(segment.in_file).is_none_or(|end| end > length) {
            return Err(KernelError::Damaged("it ends before its last segment (a partial copy?)"));
        }
        let end = segment.address.checked_add(segment.in_memory);
        if segment.address < layout::HIGH_MEMORY || end.is_none_or(|end| end > layout::HOLE_START) {
            return Err(KernelError::Damaged("a segment does not lie between 1 MiB and 3 GiB"));
        }
        Ok(Some(segment))
    }
}

/// Reads the initial RAM file system to right behind the kernel, so that both share a huge page; it has to
/// fit below the hole.
pub fn load_initrd(
    memory: &GuestMemory,
    file: &File,
    size: u64,
    kernel_end: u64,
) -> Result<Initrd, InitrdError> {
    if size == 0 {
        return Err(InitrdError::Empty);
    }
    let end = low_end(memory);
    let too_large = || InitrdError::TooLarge { size: size.div_ceil(MIB), has: end / MIB };
    let address = kernel_end.checked_next_multiple_of(PAGE).ok_or_else(too_large)?;
    if address.checked_add(size).is_none_or(|needed| needed > end) {
        return Err(too_large());
    }
    read_file(memory, file, 0, address, size)?;
    let narrow = |value: u64| u32::try_from(value).map_err(|_| too_large());
    Ok(Initrd { address: narrow(address)?, size: narrow(size)? })
}

/// The end of the memory that starts at 0.
fn low_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, |region| region.start_addr().0 + region.len())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | (u32::from(u16_at(bytes, at + 2)) << 16)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::allocate;
    use super::*;

    /// A kernel file of one segment at `address`, page-aligned in the file.
    pub(crate) fn elf(code: &[u8], address: u64, in_memory: u64) -> Vec<u8> {
        let mut file = vec![0; 4096];
        file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
        file[16..18].copy_from_slice(&EXECUTABLE.to_le_bytes());
        file[18..20].copy_from_slice(&X86_64.to_le_bytes());
        file[24..32].copy_from_slice(&address.to_le_bytes());
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        file[56..58].copy_from_slice(&1_u16.to_le_bytes());
        file[64..68].copy_from_slice(&LOADABLE.to_le_bytes());
        file[72..80].copy_from_slice(&4096_u64.to_le_bytes());
        file[88..96].copy_from_slice(&address.to_le_bytes());
        file[96..104].copy_from_slice(&(code.len() as u64).to_le_bytes());
        file[104..112].copy_from_slice(&in_memory.to_le_bytes());
        file.extend(code);
        file
    }

    pub(crate) fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn loads_a_kernel() {
        let memory = allocate(64).unwrap();
        let code = vec![0x90; 5000];
        let kernel = Kernel::open(file(&elf(&code, 0x100_0000, 9000))).unwrap();
        kernel.load(&memory, 0).unwrap();
        assert_eq!(kernel.entry(), 0x100_0000);
        assert_eq!(kernel.end(), 0x100_0000 + 9000);
        let mut read = vec![0xff; 9000];
        memory.read_slice(&mut read, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(read[..5000], code);
        assert!(read[5000..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn garbage_is_named() {
        let open = |content: &[u8]| Kernel::open(file(content)).unwrap_err().to_string();
        assert!(open(b"").contains("not an ELF file"));
        assert!(open(&[0xa5; 4096]).contains("uncompressed vmlinux"));
        let good = elf(&[0x90; 16], 0x100_0000, 16);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            open(&bad)
        };
        assert!(with(18, &[3]).contains("another processor"));
        assert!(with(16, &[3]).contains("library"));
        assert!(with(54, &[1]).contains("program headers"));
        assert!(with(32, &[0xff; 8]).contains("before its program headers"));
        assert!(with(96, &[0xff; 8]).contains("larger in the file"));
        assert!(with(72, &[0xff; 8]).contains("before its last segment"));
        assert!(with(88, &[0; 8]).contains("between 1 MiB and 3 GiB"));
        assert!(with(104, &[0xff; 8]).contains("between 1 MiB and 3 GiB"));
        assert!(with(24, &[0; 8]).contains("entry point"));
        assert!(with(64, &[9]).contains("entry point"));
    }

    #[test]
    fn every_cut_and_flip_is_an_error_or_loads() {
        let good = elf(&[0x90; 64], 0x100_0000, 8192);
        for at in 0..128 {
            for value in [0, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(kernel) = Kernel::open(file(&bad)) {
                    let _ = kernel.load(&allocate(64).unwrap(), 0);
                }
            }
            assert!(Kernel::open(file(&good[..at])).is_err());
        }
    }

    #[test]
    fn too_little_memory_names_what_is_needed() {
        let kernel = Kernel::open(file(&elf(&[0x90; 16], 16 << 20, 4 << 20))).unwrap();
        let error = kernel.load(&allocate(16).unwrap(), 4 << 20).unwrap_err();
        assert_eq!(
            error.to_string(),
            "16 MiB of memory is too little for this kernel: it needs at least 44"
        );
        kernel.load(&allocate(44).unwrap(), 4 << 20).unwrap();
    }

    #[test]
    fn initrd_goes_behind_the_kernel() {
        let memory = allocate(32).unwrap();
        let content = vec![7; 10_000];
        let initrd = load_initrd(&memory, &file(&content), 10_000, 0x100_0001).unwrap();
        assert_eq!(initrd, Initrd { address: 0x100_1000, size: 10_000 });
        let mut read = vec![0; 10_000];
        memory.read_slice(&mut read, GuestAddress(u64::from(initrd.address))).unwrap();
        assert_eq!(read, content);
        let load = |size, kernel_end| load_initrd(&memory, &file(&content), size, kernel_end);
        assert!(matches!(load(0, 0), Err(InitrdError::Empty)));
        assert!(load(10_000, (32 << 20) - 3 * PAGE).is_ok());
        for kernel_end in [(32 << 20) - 2 * PAGE, 32 << 20, u64::MAX] {
            assert!(matches!(load(10_000, kernel_end), Err(InitrdError::TooLarge { .. })));
        }
        assert!(matches!(load(1 << 40, 0), Err(InitrdError::TooLarge { .. })));
    }
}
