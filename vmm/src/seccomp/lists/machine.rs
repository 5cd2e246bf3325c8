//! What a machine calls.

use syscalls::Sysno;

use super::every::KICK;
use super::requests::*;
use crate::seccomp::list::{Allowed, any, is, with};

/// Of the event loop and of vCPUs: both find themselves in devices' code.
pub(super) const DEVICES: &[Allowed] = &[
    any(Sysno::eventfd2, "a queue's notifications and interrupts"),
    any(Sysno::readv, "frames from a tap"),
    any(Sysno::writev, "frames to a tap"),
    any(Sysno::recvmsg, "the file server's answers, the shim's requests, bytes of a stream"),
    any(Sysno::sendmsg, "requests to the file server, answers to the shim, bytes of a stream"),
    any(Sysno::recvfrom, "the file server's answers, bytes of a stream"),
    any(Sysno::sendto, "requests to the file server, bytes of a stream"),
    any(Sysno::shutdown, "the end of a stream, of the control socket"),
    with(
        Sysno::socketpair,
        &[&[is(0, libc::AF_UNIX as i64), is(1, (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as i64)]],
        "a stream: one end is ours, the other the shim's",
    ),
    with(
        Sysno::setsockopt,
        &[&[is(1, libc::SOL_SOCKET as i64), is(2, libc::SO_SNDBUF as i64)]],
        "room for a stream's bytes",
    ),
    with(Sysno::fcntl, &[&[is(1, libc::F_SETFL as i64)]], "a tap that does not block"),
    any(Sysno::timerfd_create, "a rate limiter"),
    any(Sysno::timerfd_settime, "when a rate limiter has refilled"),
    any(Sysno::epoll_ctl, "a device's descriptors in the event loop"),
    with(
        Sysno::ioctl,
        &[
            &[is(1, KVM_IRQFD)],
            &[is(1, KVM_IOEVENTFD)],
            &[is(1, KVM_SET_GSI_ROUTING)],
            &[is(1, KVM_SIGNAL_MSI)],
        ],
        "interrupts and notifications of devices",
    ),
    with(
        Sysno::ioctl,
        &[
            &[is(1, TUNGETIFF)],
            &[is(1, TUNSETOFFLOAD)],
            &[is(1, TUNSETVNETHDRSZ)],
            &[is(1, TUNSETQUEUE)],
        ],
        "a tap's queues and offloads",
    ),
    with(
        Sysno::ioctl,
        &[
            &[is(1, VHOST_SET_OWNER)],
            &[is(1, VHOST_GET_FEATURES)],
            &[is(1, VHOST_SET_FEATURES)],
            &[is(1, VHOST_SET_MEM_TABLE)],
            &[is(1, VHOST_SET_VRING_NUM)],
            &[is(1, VHOST_SET_VRING_BASE)],
            &[is(1, VHOST_GET_VRING_BASE)],
            &[is(1, VHOST_SET_VRING_ADDR)],
            &[is(1, VHOST_SET_VRING_CALL)],
            &[is(1, VHOST_SET_VRING_KICK)],
            &[is(1, VHOST_NET_SET_BACKEND)],
        ],
        "the kernel's path for frames",
    ),
];

/// Of the event loop.
pub(super) const EVENTS: &[Allowed] = &[
    any(Sysno::epoll_wait, "what happens next"),
    with(
        Sysno::ioctl,
        &[
            &[is(1, KVM_CREATE_VCPU)],
            &[is(1, KVM_GET_VCPU_MMAP_SIZE)],
            &[is(1, KVM_CHECK_EXTENSION)],
            &[is(1, KVM_SET_CPUID2)],
            &[is(1, KVM_SET_MSRS)],
            &[is(1, KVM_GET_LAPIC)],
            &[is(1, KVM_SET_LAPIC)],
            &[is(1, KVM_GET_SREGS)],
            &[is(1, KVM_SET_SREGS)],
            &[is(1, KVM_SET_REGS)],
            &[is(1, KVM_SET_FPU)],
        ],
        "a vCPU that is added",
    ),
    with(
        Sysno::ioctl,
        &[&[is(1, KVM_SET_USER_MEMORY_REGION)]],
        "memory that is added or taken away",
    ),
];

/// Of a vCPU.
pub(super) const VCPU: &[Allowed] =
    &[with(Sysno::ioctl, &[&[is(1, KVM_RUN)]], "running the guest")];

/// Of a machine that is built.
pub(super) const BOOT: &[Allowed] = &[
    any(Sysno::epoll_create1, "the event loop"),
    any(Sysno::pread64, "the guest's kernel and its initial file system"),
    any(Sysno::statx, "the sizes of both"),
    any(Sysno::lseek, "the guest's kernel"),
    with(
        Sysno::rt_sigaction,
        &[&[is(0, KICK)]],
        "the handler of the signal that makes a vCPU look",
    ),
    with(
        Sysno::ioctl,
        &[
            &[is(1, KVM_GET_API_VERSION)],
            &[is(1, KVM_CREATE_VM)],
            &[is(1, KVM_GET_SUPPORTED_CPUID)],
            &[is(1, KVM_SET_TSS_ADDR)],
            &[is(1, KVM_SET_IDENTITY_MAP_ADDR)],
            &[is(1, KVM_CREATE_IRQCHIP)],
            &[is(1, KVM_ENABLE_CAP)],
            &[is(1, KVM_REGISTER_COALESCED_MMIO)],
        ],
        "the virtual machine",
    ),
];
