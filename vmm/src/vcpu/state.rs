//! A vCPU's state, to be saved and put back (Linux `Documentation/virt/kvm/api.rst`).

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::vm::KvmError;

const STATE_VERSION: u16 = 1;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Why a state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Saved by a version that is not known.
    #[error("saved vCPU state of version {0} is not understood")]
    Version(u16),
    /// More than KVM takes.
    #[error("saved vCPU state has too many CPUID leaves or MSRs")]
    TooMany,
    /// The vCPU is not paused.
    #[error("the vCPU is not paused")]
    Running,
}

/// Everything KVM knows of a vCPU.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    version: u16,
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not running. Of the MSRs in `list` those it has not are
    /// left out.
    pub(super) fn save(fd: &VcpuFd, list: &[u32]) -> Result<Self, StateError> {
        // The order is KVM's: reading the MP state settles pending INIT and SIPI first.
        let mp_state = fd.get_mp_state().map_err(KvmError::call("read an MP state"))?;
        let cpuid =
            fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::call("read a vCPU's CPUID"))?;
        Ok(Self {
            version: STATE_VERSION,
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs: fd.get_regs().map_err(KvmError::call("read registers"))?,
            sregs: fd.get_sregs().map_err(KvmError::call("read special registers"))?,
            xsave: fd.get_xsave().map_err(KvmError::call("read the FPU"))?,
            xcrs: fd.get_xcrs().map_err(KvmError::call("read XCRs"))?,
            debug_regs: fd.get_debug_regs().map_err(KvmError::call("read debug registers"))?,
            lapic: fd.get_lapic().map_err(KvmError::call("read a local APIC"))?,
            msrs: read_msrs(fd, list)?,
            events: fd.get_vcpu_events().map_err(KvmError::call("read pending events"))?,
        })
    }

    /// Puts the state into a fresh vCPU of the same host kind.
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), StateError> {
        if self.version != STATE_VERSION {
            return Err(StateError::Version(self.version));
        }
        let cpuid =
            kvm_bindings::CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany)?;
        fd.set_cpuid2(&cpuid).map_err(KvmError::call("set a vCPU's CPUID"))?;
        fd.set_mp_state(self.mp_state).map_err(KvmError::call("set an MP state"))?;
        fd.set_regs(&self.regs).map_err(KvmError::call("set registers"))?;
        fd.set_sregs(&self.sregs).map_err(KvmError::call("set special registers"))?;
        // SAFETY: without a permission for dynamic features (never asked for) KVM's xsave area is
        // the 4096 bytes of the structure.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(KvmError::call("set the FPU"))?;
        // A processor without XSAVE has none, and does not take none either.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(KvmError::call("set XCRs"))?;
        }
        fd.set_debug_regs(&self.debug_regs).map_err(KvmError::call("set debug registers"))?;
        // The timer's mode must be there before its deadline, which is an MSR.
        fd.set_lapic(&self.lapic).map_err(KvmError::call("set a local APIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().copied().partition(|msr| msr.index == MSR_TSC_DEADLINE);
        write_msrs(fd, &others)?;
        write_msrs(fd, &deadline)?;
        fd.set_vcpu_events(&self.events).map_err(KvmError::call("set pending events"))?;
        Ok(())
    }
}

/// KVM stops at the first MSR it cannot read; go on behind it.
fn read_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut entries = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let asked: Vec<_> = rest
            .iter()
            .take(128)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(|_| StateError::TooMany)?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::call("read MSRs"))?;
        entries.extend_from_slice(&msrs.as_slice()[..read]);
        rest = &rest[if read < asked.len() { read + 1 } else { read }..];
    }
    Ok(entries)
}

/// An MSR KVM lets nobody write is passed over, as its value cannot have been changed either.
fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(128)];
        let msrs = Msrs::from_entries(chunk).map_err(|_| StateError::TooMany)?;
        let written = fd.set_msrs(&msrs).map_err(KvmError::call("set MSRs"))?;
        rest = &rest[if written < chunk.len() { written + 1 } else { written }..];
    }
    Ok(())
}
