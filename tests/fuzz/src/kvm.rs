//! States of what KVM holds. Where there is no KVM they are only read.

use std::fs::File;
use std::sync::Arc;

use husk_vmm::bus::Bus;
use husk_vmm::machine::EndSignal;
use husk_vmm::vcpu::{BootEntry, Shared, VcpuHandle, VcpuState, create_vcpu};
use husk_vmm::vm::{GuestMemory, InterruptChips, Kvm, Vm, VmState};
use serde_json::Value;
use vm_memory::GuestAddress;

use crate::states::state;

/// A virtual machine that never runs, and what it has saved.
struct Machine {
    vcpu: VcpuHandle,
    vm: Vm,
    vcpu_state: Value,
    state: Value,
}

impl Machine {
    fn new() -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/kvm").ok()?;
        let kvm = Kvm::new(device.into()).ok()?;
        let mut vm = kvm.create_vm(InterruptChips::Pins).ok()?;
        vm.add_memory(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).ok()?).ok()?;
        let fd = create_vcpu(&vm, 0, 1, BootEntry { address: 0x10_0000 }).ok()?;
        let shared = Shared::new(Bus::new(), Bus::new(), Arc::new(EndSignal::new().ok()?));
        let vcpu = VcpuHandle::start(fd, 0, Arc::new(shared)).ok()?;
        let vcpu_state = serde_json::to_value(vcpu.save(&kvm.msr_list().ok()?).ok()?).ok()?;
        let state = serde_json::to_value(vm.save().ok()?).ok()?;
        Some(Self { vcpu, vm, vcpu_state, state })
    }
}

/// A virtual processor's.
pub fn vcpu(rest: &[u8]) {
    let machine = Machine::new();
    let good = machine.as_ref().map_or(Value::Null, |machine| machine.vcpu_state.clone());
    let Some(state) = state::<VcpuState>(good, rest) else { return };
    if let Some(machine) = machine
        && let Err(error) = machine.vcpu.restore(Box::new(state))
    {
        drop(error.to_string());
    }
}

/// That of the machine beside its processors.
pub fn machine(rest: &[u8]) {
    let machine = Machine::new();
    let good = machine.as_ref().map_or(Value::Null, |machine| machine.state.clone());
    let Some(state) = state::<VmState>(good, rest) else { return };
    if let Some(machine) = machine
        && let Err(error) = machine.vm.restore(&state)
    {
        drop(error.to_string());
    }
}
