//! `husk-vmm probe`: whether this host's KVM really runs guests.
//!
//! A KVM may open, make machines and yet not run them: without hardware virtualisation some run a
//! guest's kernel and fail in its user space. So the probe runs a few instructions where containers
//! will, in 64-bit mode at privilege level 3, with a system call among them.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// In user space: `syscall; mov al, 0x42; out 0x80, al`, then in circles.
const CODE: &[u8] = &[0x0f, 0x05, 0xb0, MARK, 0xe6, PORT, 0xeb, 0xfe];

/// In the kernel: `sysretq`.
const ENTRY: &[u8] = &[0x48, 0x0f, 0x07];
const MARK: u8 = 0x42;
const PORT: u8 = 0x80;

const CODE_AT: u64 = 0x1000;
const ENTRY_AT: u64 = 0x1800;
const TABLES_AT: u64 = 0x2000;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;

const STACK_END: u64 = 0x8000;
const MEMORY: usize = 0x1_0000;

/// Seconds after which a virtual CPU that does not come back is given up, and this process with it.
const LIMIT: libc::c_uint = 5;

/// Why there are no guests on this host.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A request to KVM failed.
    #[error("KVM: {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The probe's memory could not be set up.
    #[error("memory of the probe")]
    Memory(#[source] io::Error),
    /// The virtual CPU stopped without having run the code.
    #[error("the virtual CPU stopped at {0} instead of running")]
    Stopped(String),
}

/// Runs a few instructions in a machine of their own.
pub fn run() -> Result<(), ProbeError> {
    // SAFETY: takes a number. The default action of SIGALRM ends the process.
    unsafe { libc::alarm(LIMIT) };
    let kvm = Kvm::new().map_err(|error| ProbeError::Kvm("does not open", error))?;
    let vm = kvm.create_vm().map_err(|error| ProbeError::Kvm("makes no machine", error))?;
    let memory = memory().map_err(ProbeError::Memory)?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| ProbeError::Memory(io::Error::other(error)))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: `memory` is that long and outlives the machine, which is dropped before it.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| ProbeError::Kvm("takes no memory", error))?;
    let mut vcpu =
        vm.create_vcpu(0).map_err(|error| ProbeError::Kvm("makes no virtual CPU", error))?;
    enter_user_space(&vcpu).map_err(|error| ProbeError::Kvm("takes no registers", error))?;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, [MARK])) if port == u16::from(PORT) => return Ok(()),
            Ok(exit) => return Err(ProbeError::Stopped(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(ProbeError::Kvm("does not run a virtual CPU", error)),
        }
    }
}

/// The code, and page tables that map the first 2 MiB to themselves, for user space too.
fn memory() -> io::Result<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(io::Error::other)?;
    // Present, writable, user; the last level is a large page.
    let tables = [
        (TABLES_AT, (TABLES_AT + 0x1000) | 0x7),
        (TABLES_AT + 0x1000, (TABLES_AT + 0x2000) | 0x7),
        (TABLES_AT + 0x2000, 0x87),
    ];
    for (at, entry) in tables {
        memory.write_obj(entry, GuestAddress(at)).map_err(io::Error::other)?;
    }
    memory.write_slice(CODE, GuestAddress(CODE_AT)).map_err(io::Error::other)?;
    memory.write_slice(ENTRY, GuestAddress(ENTRY_AT)).map_err(io::Error::other)?;
    Ok(memory)
}

/// 64-bit mode at privilege level 3, with the right to use ports.
fn enter_user_space(vcpu: &kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x23,
        type_: 3,
        present: 1,
        dpl: 3,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    };
    special.cs = kvm_segment { selector: 0x1b, type_: 11, db: 0, l: 1, ..data };
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.cr0 = 0x8000_0031; // paging, numeric error, extension type, protection
    special.cr3 = TABLES_AT;
    special.cr4 = 0x20; // physical address extension
    special.efer = 0x501; // long mode enabled and active, system calls
    vcpu.set_sregs(&special)?;
    // Where system calls enter, and the segments they enter and leave with.
    let register = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let list = [register(MSR_STAR, 0x0010_0008 << 32), register(MSR_LSTAR, ENTRY_AT)];
    // Two are far from too many.
    let list = Msrs::from_entries(&list).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vcpu.set_msrs(&list)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE_AT;
    registers.rsp = STACK_END;
    registers.rflags = 0x3002; // I/O privilege level 3
    vcpu.set_regs(&registers)
}
