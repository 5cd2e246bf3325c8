//! The zero page and the command line (Linux `Documentation/arch/x86/zero-page.rst`).

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion as _};

use super::layout;
use crate::vm::GuestMemory;

const PAGE: usize = 4096;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const PROTOCOL: usize = 0x206;
const LOADER_TYPE: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const COMMAND_LINE_LENGTH: usize = 0x238;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;

/// Where the initial RAM file system lies, below 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address.
    pub address: u32,
    /// Bytes.
    pub size: u32,
}

/// What the kernel is told at its start.
#[derive(Debug, Clone, Copy)]
pub struct BootParams<'a> {
    /// The command line, checked by [`check_command_line`].
    pub command_line: &'a str,
    /// The initial RAM file system, if there is one.
    pub initrd: Option<Initrd>,
}

/// Why a command line cannot be given to a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// Longer than Linux takes.
    #[error(
        "the kernel command line has {0} bytes and Linux takes at most {max}: shorten it",
        max = layout::COMMAND_LINE_SIZE - 1
    )]
    Length(usize),
    /// It holds a NUL or another control character.
    #[error("the kernel command line holds the control character {0:?}: remove it")]
    Character(char),
}

/// Checks that Linux will take the whole command line as it is.
pub fn check_command_line(text: &str) -> Result<(), CommandLineError> {
    if text.len() >= layout::COMMAND_LINE_SIZE {
        return Err(CommandLineError::Length(text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(character) => Err(CommandLineError::Character(character)),
        None => Ok(()),
    }
}

/// Writes command line and zero page into guest memory.
pub fn write_boot_params(
    memory: &GuestMemory,
    params: &BootParams<'_>,
) -> Result<(), GuestMemoryError> {
    let mut text = params.command_line.as_bytes().to_vec();
    text.push(0);
    memory.write_slice(&text, GuestAddress(layout::COMMAND_LINE))?;
    memory.write_slice(&zero_page(memory, params)[..], GuestAddress(layout::ZERO_PAGE))
}

fn zero_page(memory: &GuestMemory, params: &BootParams<'_>) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    put(&mut page, BOOT_FLAG, &0xaa55_u16.to_le_bytes());
    put(&mut page, HEADER, b"HdrS");
    put(&mut page, PROTOCOL, &0x020f_u16.to_le_bytes());
    put(&mut page, LOADER_TYPE, &[LOADER_UNDEFINED]);
    put(&mut page, LOAD_FLAGS, &[LOADED_HIGH]);
    put(&mut page, KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    put(&mut page, COMMAND_LINE_POINTER, &layout::COMMAND_LINE.to_le_bytes()[..4]);
    put(&mut page, COMMAND_LINE_LENGTH, &(layout::COMMAND_LINE_SIZE as u64 - 1).to_le_bytes()[..4]);
    if let Some(initrd) = params.initrd {
        put(&mut page, RAMDISK_IMAGE, &initrd.address.to_le_bytes());
        put(&mut page, RAMDISK_SIZE, &initrd.size.to_le_bytes());
    }
    let map = memory_map(memory);
    for (index, &(start, size, kind)) in map.iter().enumerate() {
        let at = E820_TABLE + index * E820_ENTRY;
        put(&mut page, at, &start.to_le_bytes());
        put(&mut page, at + 8, &size.to_le_bytes());
        put(&mut page, at + 16, &kind.to_le_bytes());
        page[E820_ENTRIES] += 1;
    }
    page
}

/// Start, size and kind: at most four entries, as memory has at most two regions.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let reserved = layout::HIGH_MEMORY - layout::MP_TABLE;
    let mut map =
        vec![(0, layout::MP_TABLE, E820_RAM), (layout::MP_TABLE, reserved, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        map.push((start, end.saturating_sub(start), E820_RAM));
    }
    map
}

fn put(page: &mut [u8; PAGE], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
        let ranges: Vec<_> = ranges.iter().map(|&(a, s)| (GuestAddress(a), s)).collect();
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn tells_memory_initrd_and_command_line() {
        let memory = memory(&[(0, 0xc000_0000), (1 << 32, 0x4000_0000)]);
        let initrd = Initrd { address: 0xbf00_0000, size: 12345 };
        let params = BootParams { command_line: "quiet", initrd: Some(initrd) };
        write_boot_params(&memory, &params).unwrap();
        let mut text = [0xff; 6];
        memory.read_slice(&mut text, GuestAddress(layout::COMMAND_LINE)).unwrap();
        assert_eq!(&text, b"quiet\0");
        let read = |at: usize| -> u32 {
            memory.read_obj(GuestAddress(layout::ZERO_PAGE + at as u64)).unwrap()
        };
        assert_eq!(read(HEADER).to_le_bytes(), *b"HdrS");
        assert_eq!(read(RAMDISK_IMAGE), 0xbf00_0000);
        assert_eq!(read(RAMDISK_SIZE), 12345);
        assert_eq!(read(COMMAND_LINE_POINTER), 0x2_0000);
        assert_eq!(read(E820_ENTRIES) & 0xff, 4);
        let entry = |index: usize| {
            let at = layout::ZERO_PAGE + (E820_TABLE + index * E820_ENTRY) as u64;
            let start: u64 = memory.read_obj(GuestAddress(at)).unwrap();
            let size: u64 = memory.read_obj(GuestAddress(at + 8)).unwrap();
            let kind: u32 = memory.read_obj(GuestAddress(at + 16)).unwrap();
            (start, size, kind)
        };
        assert_eq!(entry(0), (0, 0x9_fc00, E820_RAM));
        assert_eq!(entry(1), (0x9_fc00, 0x6_0400, E820_RESERVED));
        assert_eq!(entry(2), (0x10_0000, 0xbff0_0000, E820_RAM));
        assert_eq!(entry(3), (1 << 32, 0x4000_0000, E820_RAM));
    }

    #[test]
    fn bad_command_lines_are_refused() {
        assert_eq!(check_command_line(&"x".repeat(2047)), Ok(()));
        assert_eq!(check_command_line(&"x".repeat(2048)), Err(CommandLineError::Length(2048)));
        assert_eq!(check_command_line("a\0b"), Err(CommandLineError::Character('\0')));
    }
}
