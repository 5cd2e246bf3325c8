//! A process in the jail of a role, and children of it that each try one attack, with that role's filter
//! and without.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use husk_vmm::jail;
use husk_vmm::seccomp::{self, STATUS, Thread};
use libc::{c_int, c_long};

use super::host::Host;

/// Descriptors of the jailed process: a folder and a program of the host, as if they had been left open
/// by mistake, then a socket. (In the file server the first is its own folder.)
pub const FOLDER: RawFd = 0;
pub const PROGRAM: RawFd = 1;
pub const SOCKET: RawFd = 2;
const LAST: RawFd = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Machine,
    Files,
}

/// How an attack is to end.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// The kernel refuses, with one of these.
    Refused(&'static [c_int]),
    /// The filter ends the process and names this call.
    Named(&'static str),
    /// No wall of the jail stands here on every host: the filter is the only one.
    FilterOnly,
}

/// What stops an attack: the jail without the filter, then both.
pub type Walls = (End, End);

/// An attack.
pub struct Row {
    pub name: &'static str,
    machine: Walls,
    files: Walls,
    /// The Landlock that its refusal needs.
    landlock: c_long,
    attempt: fn(&Host) -> c_long,
}

impl Row {
    /// Ends alike in both roles.
    pub const fn both(name: &'static str, walls: Walls, attempt: fn(&Host) -> c_long) -> Self {
        Self { name, machine: walls, files: walls, landlock: 0, attempt }
    }

    pub const fn each(
        name: &'static str,
        machine: Walls,
        files: Walls,
        attempt: fn(&Host) -> c_long,
    ) -> Self {
        Self { name, machine, files, landlock: 0, attempt }
    }

    /// On a kernel whose Landlock is older the jail has no such wall.
    pub const fn since_landlock(mut self, version: c_long) -> Self {
        self.landlock = version;
        self
    }
}

/// Enters the jail, as the program does. Only once, and with nothing open but the first descriptors.
pub fn enter(role: Role, host: &mut Host) {
    match role {
        Role::Machine => drop(jail::enter_machine(&[]).unwrap()),
        Role::Files => {
            let jail = jail::enter_files(&[]).unwrap();
            // SAFETY: open as long as this process is.
            let descriptors = jail.close(unsafe { BorrowedFd::borrow_raw(FOLDER) }).unwrap();
            host.descriptors = Some(descriptors);
        }
    }
    host.last = host.descriptors.as_ref().map_or(LAST, |file| LAST.max(file.as_raw_fd()));
}

/// Tries each row, as the role goes on from `begin`; those that ended otherwise than they should.
pub fn try_all(
    role: Role,
    rows: &[&[Row]],
    host: &mut Host,
    begin: impl Fn(&mut Host),
) -> Vec<String> {
    let filtered: &[&[Thread]] = match role {
        // The event loop's and a vCPU's filter lie over the one that the machine was built under.
        Role::Machine => &[&[Thread::Boot, Thread::Events], &[Thread::Boot, Thread::Vcpu]],
        Role::Files => &[&[Thread::Folder, Thread::Server]],
    };
    let mut wrong = Vec::new();
    for row in rows.iter().copied().flatten().filter(|row| row.landlock <= landlock_version()) {
        let (alone, both) = match role {
            Role::Machine => row.machine,
            Role::Files => row.files,
        };
        let stages = [(&[][..], alone)];
        let stages = stages.into_iter().chain(filtered.iter().map(|threads| (*threads, both)));
        for (threads, expected) in stages {
            let found = run(row, threads, host, &begin);
            if !found.is(expected) {
                wrong.push(format!("{role:?} {threads:?}: {}: {found:?}", row.name));
            }
        }
    }
    wrong
}

/// How an attack did end.
#[derive(Debug)]
struct Found {
    status: c_int,
    said: String,
}

impl Found {
    fn is(&self, expected: End) -> bool {
        let code = libc::WIFEXITED(self.status).then(|| libc::WEXITSTATUS(self.status));
        match expected {
            End::Refused(errors) => code.is_some_and(|code| errors.contains(&code)),
            End::Named(call) => {
                code == Some(STATUS) && self.said.contains(&format!(" called {call} "))
            }
            End::FilterOnly => true,
        }
    }
}

/// Makes the attempt in a child under these filters; it ends with the error as its status.
fn run(row: &Row, threads: &[Thread], host: &mut Host, begin: impl Fn(&mut Host)) -> Found {
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    // SAFETY: the child goes on in this only thread, and ends without coming back.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: descriptors by number, none of which is used otherwise; an attempt that hangs is
            // ended by the alarm.
            unsafe {
                libc::alarm(5);
                libc::dup2(ours.as_raw_fd(), SOCKET);
                libc::close(ours.as_raw_fd());
                libc::close(theirs.as_raw_fd());
            }
            begin(host);
            for (index, thread) in threads.iter().enumerate() {
                let enter = if index == 0 { seccomp::confine } else { seccomp::narrow };
                enter(*thread).unwrap();
            }
            let result = (row.attempt)(host);
            let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            // SAFETY: ends the process.
            unsafe { libc::_exit(if result < 0 { error } else { 0 }) }
        }
        child => {
            drop(ours);
            let mut said = String::new();
            theirs.read_to_string(&mut said).unwrap();
            let mut status = 0;
            // SAFETY: our child, and a status of ours.
            unsafe { libc::waitpid(child, &mut status, 0) };
            Found { status, said }
        }
    }
}

/// Out of the way of what `apart` and `place` put into the first descriptors.
pub fn out_of_the_way(file: &File) -> OwnedFd {
    // SAFETY: an open descriptor by number, and one that is new.
    unsafe { OwnedFd::from_raw_fd(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100)) }
}

/// Puts the host's things in the place of what the jail leaves open.
pub fn place(folder: &OwnedFd, program: &OwnedFd) {
    for (file, number) in [(folder, FOLDER), (program, PROGRAM)] {
        // SAFETY: standard input and output are not used in this process.
        assert!(unsafe { libc::dup2(file.as_raw_fd(), number) } >= 0);
    }
}

/// Makes a call with these arguments, addresses as numbers.
pub fn call<const COUNT: usize>(number: c_long, arguments: [u64; COUNT]) -> c_long {
    let mut all = [0; 6];
    all[..COUNT].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: rows give terminated texts and arrays that outlive the call and have the room it needs.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// `LANDLOCK_CREATE_RULESET_VERSION`; less than nothing without Landlock.
fn landlock_version() -> c_long {
    static VERSION: std::sync::OnceLock<c_long> = std::sync::OnceLock::new();
    *VERSION.get_or_init(|| call(libc::SYS_landlock_create_ruleset, [0, 0, 1]))
}
