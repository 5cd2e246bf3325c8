//! The guest kernel's file, and the initial RAM file system behind it.
//!
//! What is loaded lies inside memory, the kernel above the first MiB, and both hold what their files
//! do.

use std::fs::File;

use husk_vmm::arch::x86_64::{
    BootParams, Initrd, check_command_line, layout, write_boot_params, write_boot_tables,
};
use husk_vmm::vm::{GuestMemory, Kernel, load_initrd};
use vm_memory::{Bytes, GuestAddress};

use crate::file;
use crate::input::Input;

const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;

/// A first byte, and a file as it is or the fields of one.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let shape = input.byte();
    let image = if shape & 1 == 0 { input.0.to_vec() } else { made(&mut input) };
    let (image, _) = file::of(&image);
    let size = (17 + usize::from(shape >> 1)) * MIB;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).expect("memory");
    let Ok(kernel) = Kernel::open(image.try_clone().expect("a descriptor")) else { return };
    assert!((layout::HIGH_MEMORY..kernel.end()).contains(&kernel.entry()));
    assert!(kernel.end() <= layout::HOLE_START);
    if kernel.load(&memory, 0).is_err() {
        return;
    }
    assert!(kernel.end() <= size as u64);
    // Nothing below: there the machine's own tables are.
    let mut below = vec![0; MIB];
    memory.read_slice(&mut below, GuestAddress(0)).expect("memory");
    assert!(below.iter().all(|&byte| byte == 0));
    let initrd = initrd(&memory, &image, size as u64, kernel.end());
    let text = String::from_utf8_lossy(input.0);
    if check_command_line(&text).is_ok() {
        let params = BootParams { command_line: &text, initrd };
        write_boot_params(&memory, &params).expect("room in the first MiB");
    }
    write_boot_tables(&memory).expect("room in the first MiB");
}

/// Loads the same file as an initial RAM file system.
fn initrd(memory: &GuestMemory, image: &File, size: u64, end: u64) -> Option<Initrd> {
    let length = image.metadata().expect("a file").len();
    // One longer than the file is, too.
    assert!(load_initrd(memory, image, length + 1, end).is_err());
    let initrd = load_initrd(memory, image, length, end).ok()?;
    let address = u64::from(initrd.address);
    assert!(address >= end && address.is_multiple_of(PAGE));
    assert!(address + u64::from(initrd.size) <= size && u64::from(initrd.size) == length);
    Some(initrd)
}

/// A file with an ELF header whose fields are nearly right.
fn made(input: &mut Input<'_>) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let count = input.byte() % 5;
    let (kind, machine) = (pick(input, 2), pick(input, 62));
    let (entry, table) = (place(input), pick(input, 64));
    let (entry_size, entries) = (pick(input, 56), pick(input, count.into()));
    for (at, value, width) in
        [(16, kind, 2), (18, machine, 2), (24, entry, 8), (32, table, 8), (54, entry_size, 2)]
    {
        file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
    file[56..58].copy_from_slice(&entries.to_le_bytes()[..2]);
    for _ in 0..count {
        let mut header = [0; 56];
        let rest = input.0.len() as u64;
        let in_file = pick(input, rest);
        let fields = [
            (0, pick(input, 1), 4),
            (8, pick(input, 64), 8),
            (24, place(input), 8),
            (32, in_file, 8),
            (40, pick(input, in_file), 8),
        ];
        for (at, value, width) in fields {
            header[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        file.extend_from_slice(&header);
    }
    file.extend_from_slice(input.0);
    file
}

/// Mostly `usual`, or near it, or anything.
fn pick(input: &mut Input<'_>, usual: u64) -> u64 {
    match input.byte() {
        byte @ 0..=3 => usual.wrapping_add(u64::from(byte)).wrapping_sub(1),
        4 => 0,
        5 => u64::MAX - u64::from(input.byte()),
        6 => u64::from(input.word()) << (input.byte() % 64),
        _ => usual,
    }
}

/// An address, mostly in memory.
fn place(input: &mut Input<'_>) -> u64 {
    match input.byte() % 4 {
        0 => layout::HIGH_MEMORY,
        1 => u64::from(input.word()) << 10,
        2 => layout::HOLE_START - u64::from(input.byte()),
        _ => pick(input, 16 << 20),
    }
}
