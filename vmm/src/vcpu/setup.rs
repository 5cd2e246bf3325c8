//! A vCPU as it is before its first instruction.

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs};
use kvm_ioctls::VcpuFd;

use super::guest_cpuid;
use crate::arch::x86_64::{boot_segments, layout};
use crate::vm::{KvmError, Vm};

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTERNAL: u8 = 7;
const DELIVER_NMI: u8 = 4;
const FLAGS_RESERVED: u64 = 2;

/// Where the boot processor begins.
#[derive(Debug, Clone, Copy)]
pub struct BootEntry {
    /// The kernel's 64-bit entry point.
    pub address: u64,
}

/// Makes vCPU `number` of `count`. The first is set to the kernel's entry; the others wait for the
/// guest to start them.
pub fn create_vcpu(vm: &Vm, number: u8, count: u8, entry: BootEntry) -> Result<VcpuFd, KvmError> {
    let mut fd = vm.fd().create_vcpu(u64::from(number)).map_err(KvmError::call("create a vCPU"))?;
    fd.map_coalesced_mmio_ring().map_err(KvmError::call("map the ring of port writes"))?;
    let cpuid: CpuId = guest_cpuid(vm.cpuid(), number, count);
    fd.set_cpuid2(&cpuid).map_err(KvmError::call("set a vCPU's CPUID"))?;
    set_msrs(&fd)?;
    set_interrupt_pins(&fd)?;
    if number == 0 {
        set_registers(&fd, entry)?;
    }
    Ok(fd)
}

/// What differs from KVM's own values after reset: caches on, fast strings.
fn set_msrs(fd: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let failed = || KvmError::call("set a vCPU's MSRs");
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| failed()(kvm_ioctls::Error::new(libc::E2BIG)))?;
    match fd.set_msrs(&msrs).map_err(failed())? {
        set if set == entries.len() => Ok(()),
        _ => Err(failed()(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

/// Virtual wire mode, as a PC's firmware leaves it.
fn set_interrupt_pins(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut apic = fd.get_lapic().map_err(KvmError::call("read a local APIC"))?;
    for (register, mode) in [(LVT_LINT0, DELIVER_EXTERNAL), (LVT_LINT1, DELIVER_NMI)] {
        // Bits 8 to 10 of the register.
        let byte = &mut apic.regs[register + 1];
        *byte = (*byte & !7) | mode.cast_signed();
    }
    fd.set_lapic(&apic).map_err(KvmError::call("set a local APIC"))
}

fn set_registers(fd: &VcpuFd, entry: BootEntry) -> Result<(), KvmError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(KvmError::call("set the FPU"))?;
    let regs = kvm_regs {
        rflags: FLAGS_RESERVED,
        rip: entry.address,
        rsp: layout::STACK,
        rbp: layout::STACK,
        rsi: layout::ZERO_PAGE,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(KvmError::call("set registers"))?;
    let mut sregs = fd.get_sregs().map_err(KvmError::call("read special registers"))?;
    boot_segments(&mut sregs);
    fd.set_sregs(&sregs).map_err(KvmError::call("set special registers"))
}
