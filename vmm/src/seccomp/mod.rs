//! System call filters: an allow-list for each kind of thread, entered after the jail.
//!
//! ```text
//!   machine:  Boot ──▶ Events           files:  Folder (waits for its folder, starts the others)
//!               │        └──▶ Vcpu                ├──▶ Server    (one a channel)
//!               └──▶ Vcpu                         └──▶ VhostUser (the other border)
//! ```
//!
//! Filters add up: a thread inherits those of the thread that starts it, and a call must be on all of
//! their lists. So the first list of a process has what the later ones have, and what comes before the
//! guest's first instruction goes with the second.
//!
//! A call that is not on a list is not carried out: the process says which it was and ends with
//! [`STATUS`]. Who has taken over a process cannot get round that: changing the handler is a call that
//! is on no list, and where the signal is blocked the kernel kills.

mod list;
mod lists;
mod program;
mod report;

use std::sync::atomic::{AtomicBool, Ordering};

pub use list::{Allowed, Argument, Compare, When};
pub use program::ProgramError;
pub use report::STATUS;

/// Whether this process is confined: then each thread narrows what it may do.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Builds a machine; its first thread until the guest runs.
    Boot,
    /// The machine's event loop.
    Events,
    /// Runs a vCPU.
    Vcpu,
    /// The file server's first thread.
    Folder,
    /// Serves a channel.
    Server,
    /// Serves vhost-user.
    VhostUser,
}

impl Thread {
    /// All kinds.
    pub const ALL: [Self; 6] =
        [Self::Boot, Self::Events, Self::Vcpu, Self::Folder, Self::Server, Self::VhostUser];

    /// As messages call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Events => "event loop",
            Self::Vcpu => "vCPU",
            Self::Folder => "folder",
            Self::Server => "server",
            Self::VhostUser => "vhost-user",
        }
    }

    /// What such a thread may call. A call may be on more than one of the lists; any will do.
    pub fn lists(self) -> &'static [&'static [Allowed]] {
        match self {
            Self::Boot => lists::BOOT,
            Self::Events => lists::EVENTS,
            Self::Vcpu => lists::VCPU,
            Self::Folder => lists::FOLDER,
            Self::Server => lists::SERVER,
            Self::VhostUser => lists::VHOST_USER,
        }
    }
}

/// Why a filter could not be entered. The process must end: it is not confined as it should be.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A list that is none: a fault of ours.
    #[error("the list of system calls of a {0} thread")]
    List(&'static str, #[source] ProgramError),
    /// The kernel takes no filters.
    #[error("seccomp: cannot enter the filter of a {0} thread (CONFIG_SECCOMP_FILTER is needed)")]
    Apply(&'static str, #[source] seccompiler::Error),
    /// No handler for what a filter stops.
    #[error("seccomp: cannot have forbidden calls reported")]
    Report(#[source] std::io::Error),
}

/// Confines the process, which has one thread, to what a thread of that kind may do.
pub fn confine(thread: Thread) -> Result<(), SeccompError> {
    report::install().map_err(SeccompError::Report)?;
    // To choose how many heaps it makes for threads, the C library would read a file of /sys; one will
    // do, as messages and devices have their memory.
    // SAFETY: plain numbers, in the only thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    CONFINED.store(true, Ordering::Relaxed);
    narrow(thread)
}

/// Confines the calling thread to what that kind may do, if the process is confined: the machine
/// also runs within developers' tests, which are not.
pub fn narrow(thread: Thread) -> Result<(), SeccompError> {
    if !CONFINED.load(Ordering::Relaxed) {
        return Ok(());
    }
    report::name_thread(thread);
    let program = program::compile(thread.lists())
        .map_err(|error| SeccompError::List(thread.name(), error))?;
    seccompiler::apply_filter(&program).map_err(|error| SeccompError::Apply(thread.name(), error))
}

/// Prints every list, a line for each call: kind of thread, call, arguments, reason.
pub fn print(out: &mut impl std::io::Write) -> std::io::Result<()> {
    for thread in Thread::ALL {
        for allowed in thread.lists().iter().copied().flatten() {
            let (name, number) = (allowed.call.name(), allowed.call.id());
            write!(out, "{}\t{name}\t{number}\t", thread.name())?;
            if let When::Each(alternatives) = allowed.when {
                for (index, arguments) in alternatives.iter().enumerate() {
                    write!(out, "{}", if index == 0 { "" } else { " or " })?;
                    for (index, argument) in arguments.iter().enumerate() {
                        write!(out, "{}{argument}", if index == 0 { "" } else { ", " })?;
                    }
                }
            }
            writeln!(out, "\t{}", allowed.why)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_with_conditions_is_not_listed_without() {
        for thread in Thread::ALL {
            let all: Vec<_> = thread.lists().iter().copied().flatten().collect();
            for allowed in &all {
                let conditional = matches!(allowed.when, When::Each(_));
                // None at all would be any.
                assert!(!matches!(allowed.when, When::Each([])), "{}", allowed.call.name());
                let others = all.iter().filter(|other| other.call == allowed.call);
                for other in others {
                    let same = matches!(other.when, When::Each(_)) == conditional;
                    assert!(same, "{thread:?}: {}", allowed.call.name());
                }
                assert!(!allowed.why.is_empty());
            }
        }
    }

    #[test]
    fn later_lists_have_nothing_that_the_first_has_not() {
        for (first, later) in [
            (Thread::Boot, Thread::Events),
            (Thread::Boot, Thread::Vcpu),
            (Thread::Events, Thread::Vcpu),
            (Thread::Folder, Thread::Server),
            (Thread::Folder, Thread::VhostUser),
        ] {
            for allowed in later.lists().iter().copied().flatten() {
                let covered = first.lists().iter().copied().flatten().any(|wider| {
                    wider.call == allowed.call
                        && match (wider.when, allowed.when) {
                            (When::Always, _) => true,
                            (When::Each(wider), When::Each(narrower)) => {
                                narrower.iter().all(|arguments| wider.contains(arguments))
                            }
                            (When::Each(_), When::Always) => false,
                        }
                });
                assert!(covered, "{later:?}: {}", allowed.call.name());
            }
        }
    }
}
