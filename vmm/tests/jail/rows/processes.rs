//! Other processes.

use libc::{EACCES, EPERM, c_int, c_long};

use crate::host::Host;
use crate::role::{End, Row, Walls, call};

const fn refused(name: &'static str) -> Walls {
    (End::Refused(&[EPERM]), End::Named(name))
}

fn signal(host: &Host, signal: c_int) -> c_long {
    call(libc::SYS_tgkill, [host.victim(), host.victim(), signal.unsigned_abs().into()])
}

/// What `then` does with a descriptor of the victim.
fn by_descriptor(host: &Host, then: impl FnOnce(u64) -> c_long) -> c_long {
    let descriptor = call(libc::SYS_pidfd_open, [host.victim(), 0]);
    if descriptor < 0 { descriptor } else { then(descriptor.cast_unsigned()) }
}

/// `process_vm_readv` and `process_vm_writev` of one byte, wherever.
fn other_memory(number: c_long, host: &Host) -> c_long {
    let byte = 0_u8;
    let vector = [(&raw const byte) as u64, 1];
    let at = vector.as_ptr() as u64;
    call(number, [host.victim(), at, 1, at, 1, 0])
}

pub const ROWS: &[Row] = &[
    Row::both("kill", refused("kill"), |host| {
        call(libc::SYS_kill, [host.victim(), libc::SIGKILL.unsigned_abs().into()])
    })
    .since_landlock(6),
    Row::both("tgkill", refused("tgkill"), |host| signal(host, libc::SIGKILL)).since_landlock(6),
    // Every thread may abort, and the filter cannot tell which process.
    Row::both("tgkill with SIGABRT", (End::Refused(&[EPERM]), End::Refused(&[EPERM])), |host| {
        signal(host, libc::SIGABRT)
    })
    .since_landlock(6),
    Row::both("signal by a process descriptor", refused("pidfd_open"), |host| {
        by_descriptor(host, |descriptor| {
            let kill = libc::SIGKILL.unsigned_abs().into();
            call(libc::SYS_pidfd_send_signal, [descriptor, kill, 0, 0])
        })
    })
    .since_landlock(6),
    Row::both("take a descriptor of another process", refused("pidfd_open"), |host| {
        by_descriptor(host, |descriptor| call(libc::SYS_pidfd_getfd, [descriptor, 0, 0]))
    }),
    Row::both("enter another process's namespaces", refused("pidfd_open"), |host| {
        by_descriptor(host, |descriptor| {
            let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWNET;
            call(libc::SYS_setns, [descriptor, kinds.unsigned_abs().into()])
        })
    }),
    Row::both("process_vm_readv", refused("process_vm_readv"), |host| {
        other_memory(libc::SYS_process_vm_readv, host)
    }),
    Row::both("process_vm_writev", refused("process_vm_writev"), |host| {
        other_memory(libc::SYS_process_vm_writev, host)
    }),
    Row::both("ptrace: attach", refused("ptrace"), |host| {
        call(libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), host.victim(), 0, 0])
    }),
    Row::both("ptrace: seize", refused("ptrace"), |host| {
        call(libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), host.victim(), 0, 0])
    }),
    Row::both("kcmp", refused("kcmp"), |host| {
        call(libc::SYS_kcmp, [host.victim(), host.victim(), 0, 0, 0])
    }),
    Row::both(
        "perf of another process",
        (End::Refused(&[EACCES, EPERM]), End::Named("perf_event_open")),
        |host| {
            // struct perf_event_attr of its first size, 64 bytes: a hardware counter.
            let attributes = [64_u64 << 32, 0, 0, 0, 0, 0, 0, 0];
            let at = attributes.as_ptr() as u64;
            call(libc::SYS_perf_event_open, [at, host.victim(), u64::MAX, u64::MAX, 0])
        },
    ),
    // The file server is root as well: there only the PID namespace keeps it from other processes' limits.
    Row::each(
        "another process's limits",
        refused("prlimit64"),
        (End::FilterOnly, End::Named("prlimit64")),
        |host| {
            let mut limit = [0_u64; 2];
            let core = u64::from(libc::RLIMIT_CORE);
            call(libc::SYS_prlimit64, [host.victim(), core, 0, limit.as_mut_ptr() as u64])
        },
    ),
];
