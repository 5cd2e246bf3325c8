//! Numbers of `ioctl` requests, as `asm-generic/ioctl.h` composes them; the crates that send them do
//! not show theirs.

use std::mem::size_of;

use kvm_bindings as kvm;
use vhost::vhost_kern::vhost_binding as vhost;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC`: direction, size of what is pointed to, subsystem, number.
const fn request(direction: u32, subsystem: u8, number: u32, size: usize) -> i64 {
    // Sizes here are below 2^14, which is all there is room for.
    assert!(size < 1 << 14, "no room for the size");
    #[allow(clippy::cast_possible_truncation)]
    let size = size as u32;
    (direction << 30 | size << 16 | (subsystem as u32) << 8 | number) as i64
}

/// `KVMIO`.
const KVM: u8 = 0xae;
/// `VHOST_VIRTIO`.
const VHOST: u8 = 0xaf;

pub(super) const KVM_GET_API_VERSION: i64 = request(NONE, KVM, 0x00, 0);
pub(super) const KVM_CREATE_VM: i64 = request(NONE, KVM, 0x01, 0);
pub(super) const KVM_CHECK_EXTENSION: i64 = request(NONE, KVM, 0x03, 0);
pub(super) const KVM_GET_VCPU_MMAP_SIZE: i64 = request(NONE, KVM, 0x04, 0);
pub(super) const KVM_GET_SUPPORTED_CPUID: i64 =
    request(READ | WRITE, KVM, 0x05, size_of::<kvm::kvm_cpuid2>());
pub(super) const KVM_CREATE_VCPU: i64 = request(NONE, KVM, 0x41, 0);
pub(super) const KVM_SET_USER_MEMORY_REGION: i64 =
    request(WRITE, KVM, 0x46, size_of::<kvm::kvm_userspace_memory_region>());
pub(super) const KVM_SET_TSS_ADDR: i64 = request(NONE, KVM, 0x47, 0);
pub(super) const KVM_SET_IDENTITY_MAP_ADDR: i64 = request(WRITE, KVM, 0x48, size_of::<u64>());
pub(super) const KVM_CREATE_IRQCHIP: i64 = request(NONE, KVM, 0x60, 0);
pub(super) const KVM_REGISTER_COALESCED_MMIO: i64 =
    request(WRITE, KVM, 0x67, size_of::<kvm::kvm_coalesced_mmio_zone>());
pub(super) const KVM_SET_GSI_ROUTING: i64 =
    request(WRITE, KVM, 0x6a, size_of::<kvm::kvm_irq_routing>());
pub(super) const KVM_IRQFD: i64 = request(WRITE, KVM, 0x76, size_of::<kvm::kvm_irqfd>());
pub(super) const KVM_IOEVENTFD: i64 = request(WRITE, KVM, 0x79, size_of::<kvm::kvm_ioeventfd>());
pub(super) const KVM_RUN: i64 = request(NONE, KVM, 0x80, 0);
pub(super) const KVM_SET_REGS: i64 = request(WRITE, KVM, 0x82, size_of::<kvm::kvm_regs>());
pub(super) const KVM_GET_SREGS: i64 = request(READ, KVM, 0x83, size_of::<kvm::kvm_sregs>());
pub(super) const KVM_SET_SREGS: i64 = request(WRITE, KVM, 0x84, size_of::<kvm::kvm_sregs>());
pub(super) const KVM_SET_MSRS: i64 = request(WRITE, KVM, 0x89, size_of::<kvm::kvm_msrs>());
pub(super) const KVM_SET_FPU: i64 = request(WRITE, KVM, 0x8d, size_of::<kvm::kvm_fpu>());
pub(super) const KVM_GET_LAPIC: i64 = request(READ, KVM, 0x8e, size_of::<kvm::kvm_lapic_state>());
pub(super) const KVM_SET_LAPIC: i64 = request(WRITE, KVM, 0x8f, size_of::<kvm::kvm_lapic_state>());
pub(super) const KVM_SET_CPUID2: i64 = request(WRITE, KVM, 0x90, size_of::<kvm::kvm_cpuid2>());
pub(super) const KVM_ENABLE_CAP: i64 = request(WRITE, KVM, 0xa3, size_of::<kvm::kvm_enable_cap>());
pub(super) const KVM_SIGNAL_MSI: i64 = request(WRITE, KVM, 0xa5, size_of::<kvm::kvm_msi>());

pub(super) const TUNGETIFF: i64 = libc::TUNGETIFF as i64;
pub(super) const TUNSETOFFLOAD: i64 = libc::TUNSETOFFLOAD as i64;
pub(super) const TUNSETVNETHDRSZ: i64 = libc::TUNSETVNETHDRSZ as i64;
pub(super) const TUNSETQUEUE: i64 = libc::TUNSETQUEUE as i64;

pub(super) const VHOST_GET_FEATURES: i64 = request(READ, VHOST, 0x00, size_of::<u64>());
pub(super) const VHOST_SET_FEATURES: i64 = request(WRITE, VHOST, 0x00, size_of::<u64>());
pub(super) const VHOST_SET_OWNER: i64 = request(NONE, VHOST, 0x01, 0);
pub(super) const VHOST_SET_MEM_TABLE: i64 =
    request(WRITE, VHOST, 0x03, size_of::<vhost::vhost_memory>());
pub(super) const VHOST_SET_VRING_NUM: i64 =
    request(WRITE, VHOST, 0x10, size_of::<vhost::vhost_vring_state>());
pub(super) const VHOST_SET_VRING_ADDR: i64 =
    request(WRITE, VHOST, 0x11, size_of::<vhost::vhost_vring_addr>());
pub(super) const VHOST_SET_VRING_BASE: i64 =
    request(WRITE, VHOST, 0x12, size_of::<vhost::vhost_vring_state>());
pub(super) const VHOST_GET_VRING_BASE: i64 =
    request(READ | WRITE, VHOST, 0x12, size_of::<vhost::vhost_vring_state>());
pub(super) const VHOST_SET_VRING_KICK: i64 =
    request(WRITE, VHOST, 0x20, size_of::<vhost::vhost_vring_file>());
pub(super) const VHOST_SET_VRING_CALL: i64 =
    request(WRITE, VHOST, 0x21, size_of::<vhost::vhost_vring_file>());
pub(super) const VHOST_NET_SET_BACKEND: i64 =
    request(WRITE, VHOST, 0x30, size_of::<vhost::vhost_vring_file>());
