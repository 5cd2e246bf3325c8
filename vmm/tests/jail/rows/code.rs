//! Programs, executable memory, and what the process was started with.

use libc::{EACCES, EBADF, ENOENT, c_int, c_long};

use crate::role::{End, PROGRAM, Row, Walls, call};

const EMPTY: *const libc::c_char = c"".as_ptr();

const fn by_filter(name: &'static str) -> Walls {
    (End::FilterOnly, End::Named(name))
}

fn number(number: c_int) -> u64 {
    number.unsigned_abs().into()
}

fn execute_at(descriptor: u64) -> c_long {
    let none = [0_u64];
    let at = none.as_ptr() as u64;
    call(libc::SYS_execveat, [descriptor, EMPTY as u64, at, at, number(libc::AT_EMPTY_PATH)])
}

fn map(protection: c_int) -> c_long {
    let how = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    call(libc::SYS_mmap, [0, 4096, number(protection), how, u64::MAX, 0])
}

pub const ROWS: &[Row] = &[
    Row::both("execve", (End::Refused(&[ENOENT]), End::Named("execve")), |_| {
        let none = [0_u64];
        let at = none.as_ptr() as u64;
        call(libc::SYS_execve, [c"/bin/sh".as_ptr() as u64, at, at])
    }),
    Row::both(
        "execveat of a program left open",
        (End::Refused(&[EACCES]), End::Named("execveat")),
        |_| execute_at(number(PROGRAM)),
    ),
    Row::both("a program in memory", by_filter("memfd_create"), |_| {
        let descriptor = call(libc::SYS_memfd_create, [c"program".as_ptr() as u64, 0]);
        if descriptor < 0 { descriptor } else { execute_at(descriptor.cast_unsigned()) }
    }),
    Row::both("memfd_secret", by_filter("memfd_secret"), |_| call(libc::SYS_memfd_secret, [0])),
    Row::both("mmap of executable memory", by_filter("mmap"), |_| {
        map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }),
    Row::both("mprotect to executable", by_filter("mprotect"), |_| {
        let at = map(libc::PROT_READ | libc::PROT_WRITE);
        let executable = number(libc::PROT_READ | libc::PROT_EXEC);
        call(libc::SYS_mprotect, [at.cast_unsigned(), 4096, executable])
    }),
    Row::both("pkey_mprotect to executable", by_filter("pkey_mprotect"), |_| {
        let at = map(libc::PROT_READ | libc::PROT_WRITE);
        let executable = number(libc::PROT_READ | libc::PROT_EXEC);
        call(libc::SYS_pkey_mprotect, [at.cast_unsigned(), 4096, executable, u64::MAX])
    }),
    // READ_IMPLIES_EXEC.
    Row::both("personality", by_filter("personality"), |_| {
        call(libc::SYS_personality, [0x40_0000])
    }),
    Row::both("executable shared memory", by_filter("shmget"), |_| {
        let segment = call(libc::SYS_shmget, [0, 4096, 0o700]);
        call(libc::SYS_shmat, [segment.cast_unsigned(), 0, number(libc::SHM_EXEC)])
    }),
    // Reading needs no call: it has to be gone.
    Row::both(
        "the environment it was started with",
        (End::Refused(&[EBADF]), End::Refused(&[EBADF])),
        |host| {
            // SAFETY: where the kernel has put it, the stack never ends.
            let there = unsafe { host.variable.read() } != 0;
            if there { 0 } else { call(libc::SYS_fcntl, [u64::MAX, number(libc::F_GETFD)]) }
        },
    ),
];
