//! The virtual machine: memory, KVM's objects, and what devices need of them.

mod blocks;
mod interrupts;
mod kernel;
mod kvm;
mod live;
mod memory;
mod state;

use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use blocks::{BlockBacking, BlockRange, KvmBlocks};
pub use interrupts::KvmWiring;
pub use kernel::{InitrdError, Kernel, KernelError, load_initrd};
pub use kvm::{InterruptChips, Kvm, KvmError, Vm};
pub use live::{LiveMemory, MemoryListener, MemoryView};
pub use memory::{MemoryError, allocate, read_file};
pub use state::VmState;

/// Guest memory as it is at one time; [`LiveMemory`] as devices hold it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Where a message-signalled interrupt goes: what the guest wrote into its MSI-X table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Low half of the address.
    pub address_low: u32,
    /// High half of the address.
    pub address_high: u32,
    /// The data word.
    pub data: u32,
}

/// One interrupt source: an eventfd wired to KVM (irqfd).
pub trait MsiVector: Send + Sync {
    /// Raises the interrupt. While it goes nowhere it is remembered, and raised once when it is
    /// routed again.
    fn trigger(&self) -> io::Result<()>;
    /// The descriptor that raises it, for those who write it themselves (vhost).
    fn event(&self) -> &EventFd;
    /// Sends it to `message` from now on, or nowhere (`None`: masked). What is written to the
    /// descriptor while it goes nowhere is raised once when it is routed again.
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// Hands out interrupt sources and notification addresses; KVM in the machine, a mock in tests.
pub trait Wiring: Send + Sync {
    /// A new interrupt source, going nowhere yet. Its place is free again when it is dropped.
    fn vector(&self) -> io::Result<Box<dyn MsiVector>>;
    /// Signals `event` whenever the guest writes to the guest-physical `address` (ioeventfd, any
    /// value, any width).
    fn notify(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes [`Wiring::notify`] with the same arguments.
    fn unnotify(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
