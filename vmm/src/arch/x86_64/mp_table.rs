//! The MP table: how a kernel without ACPI learns of its processors and its IOAPIC (Intel
//! MultiProcessor Specification 1.4, chapter 4).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::vm::GuestMemory;

const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
const ISA_INTERRUPTS: u8 = 16;
const HEADER_SIZE: usize = 44;
const FLOATING_SIZE: usize = 16;

/// Why the table cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// More processors than fit.
    #[error("an MP table for {0} processors does not fit")]
    TooMany(u8),
    /// Memory is not there.
    #[error("MP table")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the table for `processors` processors with the local APIC numbers 0, 1, 2, ….
/// Without `pins` there is neither IOAPIC nor ISA interrupt.
pub fn write_mp_table(
    memory: &GuestMemory,
    processors: u8,
    pins: bool,
) -> Result<(), MpTableError> {
    let table = table(processors, pins);
    if table.len() > layout::MP_TABLE_SIZE {
        return Err(MpTableError::TooMany(processors));
    }
    Ok(memory.write_slice(&table, GuestAddress(layout::MP_TABLE))?)
}

/// The floating pointer and right behind it the configuration table.
fn table(processors: u8, pins: bool) -> Vec<u8> {
    // The IOAPIC takes the number behind the last processor's.
    let io_apic = processors;
    let mut entries = Vec::with_capacity(layout::MP_TABLE_SIZE);
    let mut count: u16 = 0;
    for number in 0..processors {
        let flags = if number == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        entries.extend([PROCESSOR, number, APIC_VERSION, flags]);
        // Signature and feature flags: Linux asks CPUID.
        entries.extend([0; 16]);
        count += 1;
    }
    entries.extend([BUS, 0]);
    entries.extend(*b"ISA   ");
    count += 1;
    if pins {
        entries.extend([IO_APIC, io_apic, APIC_VERSION, ENABLED]);
        entries.extend(layout::IOAPIC.to_le_bytes());
        count += 1;
        for line in 0..ISA_INTERRUPTS {
            entries.extend([IO_INTERRUPT, VECTORED, 0, 0, 0, line, io_apic, line]);
            count += 1;
        }
    }
    entries.extend([LOCAL_INTERRUPT, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);
    count += 2;

    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend(*b"PCMP");
    let length = u16::try_from(HEADER_SIZE + entries.len()).unwrap_or(u16::MAX);
    header.extend(length.to_le_bytes());
    header.extend([4, 0]);
    header.extend(*b"HUSK    ");
    header.extend(*b"MICROVM     ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(layout::LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]);
    header[7] = checksum(header.iter().chain(&entries));

    let configuration = u32::try_from(layout::MP_TABLE).unwrap_or(0) + 16;
    let mut floating = Vec::with_capacity(FLOATING_SIZE);
    floating.extend(*b"_MP_");
    floating.extend(configuration.to_le_bytes());
    floating.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    floating[10] = checksum(floating.iter());

    [floating, header, entries].concat()
}

/// What makes the sum of all bytes zero.
fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u8 {
    bytes.fold(0_u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte))
    }

    #[test]
    fn sums_and_lengths_are_right_for_all_sizes() {
        for (processors, pins) in (1..=32).flat_map(|n| [(n, true), (n, false)]) {
            let table = table(processors, pins);
            assert!(table.len() <= layout::MP_TABLE_SIZE, "{processors}");
            let (floating, rest) = table.split_at(16);
            assert_eq!(sum(floating), 0);
            assert_eq!(u16::from_le_bytes([rest[4], rest[5]]) as usize, rest.len());
            assert_eq!(sum(rest), 0);
            let mut at = HEADER_SIZE;
            let mut entries = 0;
            while at < rest.len() {
                at += if rest[at] == PROCESSOR { 20 } else { 8 };
                entries += 1;
            }
            assert_eq!(at, rest.len());
            assert_eq!(u16::from_le_bytes([rest[34], rest[35]]), entries);
        }
    }

    #[test]
    fn is_found_where_linux_looks() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        write_mp_table(&memory, 2, true).unwrap();
        let mut mark = [0; 8];
        memory.read_slice(&mut mark, GuestAddress(0x9_fc00)).unwrap();
        assert_eq!(&mark[..4], b"_MP_");
        assert_eq!(mark[4..], 0x9_fc10_u32.to_le_bytes());
        assert!(matches!(write_mp_table(&memory, 64, true), Err(MpTableError::TooMany(64))));
    }
}
