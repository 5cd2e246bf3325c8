//! Every rule of every filter, carried out with an argument it allows and with one it does not, and
//! every call that no rule has: each in a process of its own, under the filter that the threads have.

// Everything here is a test, helpers included.
#![allow(clippy::unwrap_used)]

use std::io;
use std::os::fd::AsRawFd;

use husk_vmm::seccomp::{self, Allowed, Argument, Compare, STATUS, Thread, When};
use syscalls::Sysno;

/// An argument with which no call does anything: no address, no descriptor, no number of anything.
const NOTHING: u64 = u64::MAX;

/// On no list as an argument, and with all the bits that a mask may look at.
const FORBIDDEN: u64 = 0x7fff_fff7;

/// How a process ended that was confined and made one call.
struct End {
    status: libc::c_int,
    said: String,
}

impl End {
    fn is_forbidden(&self, call: Sysno) -> bool {
        libc::WIFEXITED(self.status)
            && libc::WEXITSTATUS(self.status) == STATUS
            && self.said.contains(&format!(" called {} ", call.name()))
    }

    fn is_allowed(&self) -> bool {
        self.said.is_empty()
    }
}

/// Makes one call under the filter of such a thread.
fn call(thread: Thread, call: Sysno, arguments: [u64; 6]) -> End {
    let (mut theirs, ours) = io::pipe().unwrap();
    // SAFETY: the child goes on in this thread alone, and ends without coming back.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: the call is given no address that is one, and the process ends after it.
            unsafe {
                libc::dup2(ours.as_raw_fd(), libc::STDERR_FILENO);
                if seccomp::confine(thread).is_err() {
                    libc::_exit(1);
                }
                let [a, b, c, d, e, f] = arguments;
                libc::syscall(libc::c_long::from(call.id()), a, b, c, d, e, f);
                libc::_exit(0);
            }
        }
        child => {
            assert!(child > 0);
            drop(ours);
            let said = io::read_to_string(&mut theirs).unwrap();
            let mut status = 0;
            // SAFETY: our child, and a status of ours.
            unsafe { libc::waitpid(child, &mut status, 0) };
            End { status, said }
        }
    }
}

fn all(thread: Thread) -> impl Iterator<Item = &'static Allowed> {
    thread.lists().iter().copied().flatten()
}

/// Arguments that fulfil these conditions and are nothing otherwise.
fn fulfilling(conditions: &[Argument]) -> [u64; 6] {
    let mut arguments = [NOTHING; 6];
    for condition in conditions {
        arguments[usize::from(condition.index)] = match condition.compare {
            Compare::Is(value) => value,
            Compare::Masked { value, .. } => value,
        };
    }
    arguments
}

#[test]
fn what_a_rule_allows_is_carried_out() {
    for thread in Thread::ALL {
        for allowed in all(thread) {
            let each = match allowed.when {
                When::Always => &[&[][..]][..],
                When::Each(each) => each,
            };
            for conditions in each {
                let end = call(thread, allowed.call, fulfilling(conditions));
                assert!(end.is_allowed(), "{thread:?}: {}: {}", allowed.call.name(), end.said);
            }
        }
    }
}

#[test]
fn an_argument_that_a_rule_does_not_allow_ends_the_process() {
    for thread in Thread::ALL {
        for allowed in all(thread) {
            let When::Each(each) = allowed.when else { continue };
            for conditions in each {
                for condition in *conditions {
                    let mut arguments = fulfilling(conditions);
                    arguments[usize::from(condition.index)] = FORBIDDEN;
                    let end = call(thread, allowed.call, arguments);
                    let name = allowed.call.name();
                    assert!(end.is_forbidden(allowed.call), "{thread:?}: {name}: {}", end.said);
                }
            }
        }
    }
}

#[test]
fn a_call_on_no_list_ends_the_process_and_is_named() {
    for thread in Thread::ALL {
        for number in Sysno::iter() {
            // The first is as if it did not exist, so that the C library takes `clone`; the others pass
            // any filter (Linux 6.13) and are a signal but from the kernel's own trampolines.
            let special = [Sysno::clone3, Sysno::uretprobe, Sysno::uprobe];
            if special.contains(&number) || all(thread).any(|allowed| allowed.call == number) {
                continue;
            }
            let end = call(thread, number, [NOTHING; 6]);
            assert!(end.is_forbidden(number), "{thread:?}: {}: {}", number.name(), end.said);
            assert!(end.said.contains(thread.name()), "{}", end.said);
        }
    }
}

#[test]
fn another_calling_convention_is_no_way_round() {
    // The x32 numbers of the same calls.
    const X32: i64 = 0x4000_0000;
    let (mut theirs, ours) = io::pipe().unwrap();
    // SAFETY: as in `call`.
    match unsafe { libc::fork() } {
        // SAFETY: as in `call`; nothing is read from these arguments.
        0 => unsafe {
            libc::dup2(ours.as_raw_fd(), libc::STDERR_FILENO);
            if seccomp::confine(Thread::Vcpu).is_ok() {
                libc::syscall(libc::SYS_write | X32, 2, c"done".as_ptr(), 4);
            }
            libc::_exit(0);
        },
        child => {
            drop(ours);
            let said = io::read_to_string(&mut theirs).unwrap();
            let mut status = 0;
            // SAFETY: our child, and a status of ours.
            unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(libc::WEXITSTATUS(status), STATUS, "{said}");
        }
    }
}
