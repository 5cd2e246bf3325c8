//! Descriptor table, page tables and control registers for the first instruction: long mode, flat
//! segments, the first GiB mapped one to one (`boot.rst`, "64-bit Boot Protocol").

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::vm::GuestMemory;

/// Linux's __BOOT_CS, __BOOT_DS and a task segment, by their place in the table.
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;
const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

/// Writes descriptor table and page tables into guest memory.
pub fn write_boot_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let segments = [segment(CODE, 0xb, true), segment(DATA, 3, false), task()];
    let mut gdt = vec![0_u64; usize::from(CODE)];
    gdt.extend(segments.iter().map(descriptor));
    let gdt: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&gdt, GuestAddress(layout::GDT))?;
    memory.write_obj(layout::PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    let directory: Vec<u8> = (0..512_u64)
        .flat_map(|page| ((page << 21) | PAGE_LARGE | PAGE_PRESENT_WRITABLE).to_le_bytes())
        .collect();
    memory.write_slice(&directory, GuestAddress(layout::PAGE_DIRECTORY))
}

/// Puts the boot processor's special registers to the state those tables are for.
pub fn boot_segments(sregs: &mut kvm_sregs) {
    let data = segment(DATA, 3, false);
    sregs.cs = segment(CODE, 0xb, true);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task();
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (TASK + 1) * 8 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr0 |= CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_ENABLE | EFER_LONG_ACTIVE;
}

/// A flat code (64-bit) or data segment of privilege 0.
fn segment(index: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// A busy task segment, as a processor in long mode must have one.
fn task() -> kvm_segment {
    kvm_segment {
        limit: 0xfffff,
        selector: TASK * 8,
        type_: 0xb,
        present: 1,
        g: 1,
        ..Default::default()
    }
}

/// A segment as the descriptor table holds it (Intel SDM 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> if segment.g == 1 && segment.s == 1 { 12 } else { 0 });
    (limit & 0xffff)
        | (u64::from(segment.type_) << 40)
        | (u64::from(segment.s) << 44)
        | (u64::from(segment.dpl) << 45)
        | (u64::from(segment.present) << 47)
        | (((limit >> 16) & 0xf) << 48)
        | (u64::from(segment.l) << 53)
        | (u64::from(segment.db) << 54)
        | (u64::from(segment.g) << 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_look_as_linux_writes_them() {
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 3, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x008f_8b00_0000_ffff);
    }

    #[test]
    fn tables_map_one_gib() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        write_boot_tables(&memory).unwrap();
        let read = |address: u64| -> u64 { memory.read_obj(GuestAddress(address)).unwrap() };
        assert_eq!(read(layout::PML4), layout::PDPT | 3);
        assert_eq!(read(layout::PDPT), layout::PAGE_DIRECTORY | 3);
        assert_eq!(read(layout::PAGE_DIRECTORY), 0x83);
        assert_eq!(read(layout::PAGE_DIRECTORY + 511 * 8), (511 << 21) | 0x83);
        assert_eq!(read(layout::GDT + u64::from(CODE) * 8), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn registers_are_in_long_mode() {
        let mut sregs = kvm_sregs::default();
        boot_segments(&mut sregs);
        assert_eq!(sregs.cs.selector, 0x10);
        assert_eq!(sregs.ds.selector, 0x18);
        assert_eq!(sregs.efer, 0x500);
        assert_eq!(sregs.cr3, layout::PML4);
    }
}
