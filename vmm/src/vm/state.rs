//! The state of a machine that KVM holds beside its vCPUs: interrupt controllers and clock.

use kvm_bindings::{
    KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::kvm::{InterruptChips, KvmError, Vm};

const STATE_VERSION: u16 = 1;

/// What [`Vm::save`] saved; of one version.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    version: u16,
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl Vm {
    /// Interrupt controllers and clock; all vCPUs are paused.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let mut chips = Vec::new();
        let all = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        let present = if self.chips() == InterruptChips::Pins { &all[..] } else { &[] };
        for &chip_id in present {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd().get_irqchip(&mut chip).map_err(KvmError::call("read an interrupt chip"))?;
            chips.push(chip);
        }
        let mut clock = self.fd().get_clock().map_err(KvmError::call("read its clock"))?;
        // A flag KVM reports but does not take.
        clock.flags &= !KVM_CLOCK_TSC_STABLE;
        Ok(VmState { version: STATE_VERSION, chips, clock })
    }

    /// Puts it back; `Ok(false)` if the state is of another version.
    pub fn restore(&self, state: &VmState) -> Result<bool, KvmError> {
        if state.version != STATE_VERSION {
            return Ok(false);
        }
        for chip in &state.chips {
            self.fd().set_irqchip(chip).map_err(KvmError::call("set an interrupt chip"))?;
        }
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        self.fd().set_clock(&clock).map_err(KvmError::call("set its clock"))?;
        Ok(true)
    }
}
