//! A machine's state taken out of one and put into another.

use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use husk_vmm::bus::Bus;
use husk_vmm::machine::EndSignal;
use husk_vmm::vcpu::{BootEntry, Shared, VcpuHandle, VcpuState, create_vcpu};
use husk_vmm::vm::{self, GuestMemory, InterruptChips, Kernel, Kvm, Vm, VmState};
use vm_memory::{Bytes, GuestAddress};

use super::guest;

const COUNTER: GuestAddress = GuestAddress(0x4_0000);

/// Counts in a register and shows it: `inc rcx; mov [0x40000], rcx; jmp`.
const COUNT: &[u8] =
    &[0x48, 0xff, 0xc1, 0x48, 0x89, 0x0c, 0x25, 0x00, 0x00, 0x04, 0x00, 0xeb, 0xf3];

struct Counter {
    vcpu: VcpuHandle,
    vm: Vm,
    memory: GuestMemory,
}

impl Counter {
    fn new(kvm: &Kvm, chips: InterruptChips) -> Self {
        let memory = vm::allocate(64).unwrap();
        let kernel = Kernel::open(guest::kernel(COUNT)).unwrap();
        kernel.load(&memory, 0).unwrap();
        husk_vmm::arch::x86_64::write_boot_tables(&memory).unwrap();
        let mut vm = kvm.create_vm(chips).unwrap();
        vm.add_memory(memory.clone()).unwrap();
        let fd = create_vcpu(&vm, 0, 1, BootEntry { address: kernel.entry() }).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let shared = Arc::new(Shared::new(Bus::new(), Bus::new(), end));
        Self { vcpu: VcpuHandle::start(fd, 0, shared).unwrap(), vm, memory }
    }

    fn run_a_while(&self) {
        self.vcpu.begin_run().unwrap();
        self.vcpu.finish().unwrap();
        let before = self.count();
        while self.count() == before {
            sleep(Duration::from_millis(1));
        }
        self.vcpu.begin_pause().unwrap();
        self.vcpu.finish().unwrap();
    }

    fn count(&self) -> u64 {
        self.memory.read_obj(COUNTER).unwrap()
    }
}

#[test]
fn a_vcpu_goes_on_in_another_machine() {
    let Some(descriptor) = guest::kvm() else { return };
    let kvm = Kvm::new(descriptor).unwrap();
    let msrs = kvm.msr_list().unwrap();
    for chips in [InterruptChips::None, InterruptChips::Pins] {
        let first = Counter::new(&kvm, chips);
        first.run_a_while();
        let count = first.count();
        let vcpu = serde_json::to_string(&first.vcpu.save(&msrs).unwrap()).unwrap();
        let machine = serde_json::to_string(&first.vm.save().unwrap()).unwrap();
        drop(first);

        let second = Counter::new(&kvm, chips);
        let vcpu: VcpuState = serde_json::from_str(&vcpu).unwrap();
        let machine: VmState = serde_json::from_str(&machine).unwrap();
        assert!(second.vm.restore(&machine).unwrap());
        second.vcpu.restore(Box::new(vcpu)).unwrap();
        second.run_a_while();
        assert!(second.count() > count, "{} after {count}", second.count());
    }
}

#[test]
fn another_version_is_refused() {
    let Some(descriptor) = guest::kvm() else { return };
    let kvm = Kvm::new(descriptor).unwrap();
    let counter = Counter::new(&kvm, InterruptChips::None);
    let mut vcpu = serde_json::to_value(counter.vcpu.save(&[]).unwrap()).unwrap();
    vcpu["version"] = 9.into();
    let vcpu: VcpuState = serde_json::from_value(vcpu).unwrap();
    let error = counter.vcpu.restore(Box::new(vcpu)).unwrap_err();
    assert_eq!(husk_vmm_error(&error), "saved vCPU state of version 9 is not understood");
    let mut machine = serde_json::to_value(counter.vm.save().unwrap()).unwrap();
    machine["version"] = 9.into();
    let machine: VmState = serde_json::from_value(machine).unwrap();
    assert!(!counter.vm.restore(&machine).unwrap());
}

fn husk_vmm_error(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}
