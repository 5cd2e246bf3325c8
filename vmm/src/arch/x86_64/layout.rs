//! Where things lie in guest-physical memory.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | 0x9fc00 | RAM; boot parameters, first tables and command line in it |
//! | 0x9fc00 | 0x100000 | reserved; the MP table at its start |
//! | 1 MiB | 3 GiB | RAM: the kernel where its file says, the initrd behind it |
//! | 3 GiB | 0xfec00000 | BARs |
//! | 0xfec00000 | 4 GiB | IOAPIC, local APICs, KVM's own pages |
//! | 4 GiB | | the rest of RAM |

/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// The empty interrupt descriptor table.
pub const IDT: u64 = 0x520;
/// The boot parameters, called zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The first stack pointer.
pub const STACK: u64 = 0x8ff0;
/// The first page table's root.
pub const PML4: u64 = 0x9000;
/// Its one table of the second level.
pub const PDPT: u64 = 0xa000;
/// Its one table of the third level: 1 GiB in pages of 2 MiB.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes for the command line with its end (Linux's own COMMAND_LINE_SIZE).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// The MP table, in the last KiB of base memory, where Linux looks for it.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes for the MP table.
pub const MP_TABLE_SIZE: usize = 1024;
/// Where memory above the PC's first MiB starts.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// The end of memory below the hole.
pub const HOLE_START: u64 = 3 << 30;
/// The start of memory above the hole.
pub const HOLE_END: u64 = 4 << 30;
/// The first address for BARs.
pub const BAR_WINDOW: u64 = HOLE_START;
/// Bytes for BARs.
pub const BAR_WINDOW_SIZE: u64 = IOAPIC as u64 - BAR_WINDOW;
/// The IOAPIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM's page for the identity map (Intel, before unrestricted guests).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's three pages for the task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;
