//! What Rust's and C's libraries call in every thread.

use syscalls::Sysno;

use crate::seccomp::list::{Allowed, any, is, with, without};

const EXECUTABLE: i64 = libc::PROT_EXEC as i64;

/// How the C library starts a thread, and nothing else that `clone` can do.
const NEW_THREAD: i64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as i64;

/// Of every thread.
pub(super) const THREAD: &[Allowed] = &[
    any(Sysno::read, "event counters, timers"),
    any(Sysno::write, "event counters, log lines"),
    any(Sysno::close, "descriptors that have been used"),
    with(
        Sysno::fcntl,
        &[
            &[is(1, libc::F_GETFD as i64)],
            &[is(1, libc::F_GETFL as i64)],
            &[is(1, libc::F_DUPFD_CLOEXEC as i64)],
        ],
        "another descriptor of the same file, whether one is open",
    ),
    any(Sysno::futex, "locks, channels between threads, joining"),
    with(
        Sysno::mmap,
        &[&[without(2, EXECUTABLE)]],
        "memory of the allocator, stacks; never to be executed",
    ),
    with(
        Sysno::mprotect,
        &[&[without(2, EXECUTABLE)]],
        "the allocator's heap, guard pages; never to be executed",
    ),
    any(Sysno::munmap, "memory of the allocator, stacks"),
    any(Sysno::mremap, "the allocator's large blocks"),
    any(Sysno::brk, "the allocator's heap"),
    with(
        Sysno::madvise,
        &[
            &[is(2, libc::MADV_DONTNEED as i64)],
            &[is(2, libc::MADV_HUGEPAGE as i64)],
            &[is(2, libc::MADV_NOHUGEPAGE as i64)],
        ],
        "a thread's stack at its end, memory that a guest gave back, large pages",
    ),
    any(Sysno::getrandom, "hash tables' seeds, the guest's random numbers"),
    any(Sysno::rt_sigprocmask, "a thread's start and end, abort"),
    any(Sysno::rt_sigreturn, "the way out of a signal's handler"),
    any(Sysno::sigaltstack, "the stack for reporting an overflow"),
    any(Sysno::restart_syscall, "a timed wait that a stop interrupted"),
    any(Sysno::sched_yield, "channels between threads, under contention"),
    any(Sysno::clock_gettime, "time, where the host's clock source has no vDSO"),
    any(Sysno::getpid, "abort"),
    any(Sysno::gettid, "abort, names of threads"),
    with(
        Sysno::tgkill,
        &[&[is(2, libc::SIGABRT as i64)], &[is(2, KICK)]],
        "abort; making a vCPU look at its commands",
    ),
    any(Sysno::exit, "a thread's end"),
    any(Sysno::exit_group, "the process's end"),
    any(Sysno::set_robust_list, "a thread's start"),
    any(Sysno::rseq, "a thread's start"),
    any(Sysno::sched_getaffinity, "a thread's start: the bounds of its stack"),
    with(
        Sysno::prctl,
        &[&[is(0, libc::PR_SET_NAME as i64)], &[is(0, libc::PR_SET_NO_NEW_PRIVS as i64), is(1, 1)]],
        "a thread's name; what the kernel wants before a filter",
    ),
    with(
        Sysno::seccomp,
        &[&[is(0, libc::SECCOMP_SET_MODE_FILTER as i64)]],
        "the next filter, which can only allow less",
    ),
];

/// `SIGRTMIN` of the C library, which a constant cannot ask it for.
pub(super) const KICK: i64 = 34;

/// `SIGSETXID`, the C library's own.
const ALL_THREADS: i64 = 33;

/// Of the first thread.
pub(super) const FIRST: &[Allowed] = &[with(
    Sysno::rt_sigaction,
    &[&[is(0, ALL_THREADS)]],
    "the C library's handler for changing the user in all threads, set with the first new one",
)];

/// Of threads that start others.
pub(super) const STARTER: &[Allowed] =
    &[with(Sysno::clone, &[&[is(0, NEW_THREAD)]], "starting a thread; no process, no namespace")];
