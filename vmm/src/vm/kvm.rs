//! KVM itself and one virtual machine on it.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

use super::{GuestMemory, KvmWiring};
use crate::arch::x86_64::layout;

const API_VERSION: i32 = 12;

const NEEDED: [(Cap, &str); 12] = [
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::SplitIrqchip, "SPLIT_IRQCHIP"),
    (Cap::CoalescedPio, "COALESCED_PIO"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::IrqRouting, "IRQ_ROUTING"),
    (Cap::SignalMsi, "SIGNAL_MSI"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER"),
];

/// Why KVM does not do what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not KVM, or another one than known.
    #[error("the descriptor is not /dev/kvm, or its KVM is of version {0} instead of 12")]
    Version(i32),
    /// The host's KVM is too old.
    #[error("this host's KVM lacks {0}: a Linux of 4.20 or later is needed")]
    Capability(&'static str),
    /// A call failed.
    #[error("KVM could not {what}")]
    Call {
        /// What it was to do.
        what: &'static str,
        /// Why it did not.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    /// For `map_err` of a call that was to do `what`.
    pub fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Call { what, source }
    }
}

/// An opened `/dev/kvm` that can do what is needed.
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
}

/// Which interrupt controllers a machine has beside its local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptChips {
    /// None: all interrupts are messages. A kernel then spends no exits on setting up pins.
    None,
    /// IOAPIC and PICs, in the kernel: for a device with an interrupt line, the serial console.
    Pins,
}

/// A virtual machine with interrupt controllers and, once added, memory.
pub struct Vm {
    fd: Arc<VmFd>,
    cpuid: CpuId,
    chips: InterruptChips,
    memory: Option<GuestMemory>,
}

impl Kvm {
    /// Takes a descriptor of `/dev/kvm`.
    pub fn new(descriptor: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open; that it is KVM's is checked right below, and on
        // another file those calls fail without harm.
        let kvm = unsafe { kvm_ioctls::Kvm::from_raw_fd(descriptor.into_raw_fd()) };
        match kvm.get_api_version() {
            API_VERSION => {}
            other => return Err(KvmError::Version(other)),
        }
        match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
            Some((_, name)) => Err(KvmError::Capability(name)),
            None => Ok(Self { kvm }),
        }
    }

    /// A machine with local APICs in the kernel, and without a PIT: a guest on KVM takes time from
    /// kvmclock and the TSC-deadline timer.
    pub fn create_vm(&self, chips: InterruptChips) -> Result<Vm, KvmError> {
        let fd = self.kvm.create_vm().map_err(KvmError::call("create a virtual machine"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::call("place the identity map"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(KvmError::call("place the task state segment"))?;
        match chips {
            InterruptChips::Pins => fd.create_irq_chip(),
            InterruptChips::None => {
                // No argument: none of the routes is kept for an IOAPIC.
                fd.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() })
            }
        }
        .map_err(KvmError::call("create the interrupt controllers"))?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("tell which CPUID leaves it supports"))?;
        Ok(Vm { fd: Arc::new(fd), cpuid, chips, memory: None })
    }

    /// The numbers of the MSRs whose values make up a vCPU's state.
    pub fn msr_list(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().map_err(KvmError::call("list its MSRs"))?;
        Ok(list.as_slice().to_vec())
    }
}

impl Vm {
    /// Gives the machine its memory, one slot a region. The machine keeps it mapped.
    pub fn add_memory(&mut self, memory: GuestMemory) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the region is mapped, and stays so as long as `self.memory` holds it, which
            // is dropped after the machine's descriptor (field order).
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::call("take the guest's memory"))?;
        }
        self.memory = Some(memory);
        Ok(())
    }

    /// KVM's descriptor of the machine.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// What processor KVM could show to the guest.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Has KVM keep writes to `length` ports until the vCPU leaves the guest for something else
    /// (`KVM_CAP_COALESCED_PIO`): whoever handles exits takes them first.
    pub fn coalesce_ports(&self, port: u64, length: u32) -> Result<(), KvmError> {
        self.fd
            .register_coalesced_mmio(IoEventAddress::Pio(port), length)
            .map_err(KvmError::call("put off port writes"))
    }

    /// The interrupt controllers beside the local APICs.
    pub fn chips(&self) -> InterruptChips {
        self.chips
    }

    /// Interrupts and notifications for devices.
    pub fn wiring(&self) -> KvmWiring {
        KvmWiring::new(self.fd.clone(), self.chips)
    }
}
