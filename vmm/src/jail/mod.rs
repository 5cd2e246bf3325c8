//! The jail of the machine and of the file server: what a process gives away before it reads anything
//! that a guest could have sent.
//!
//! The process enters by itself, at its start and with one thread: the shim starts it by `posix_spawn`,
//! which shares memory until the exec and so cannot do it for it.
//!
//! | | machine | file server |
//! |---|---|---|
//! | mount, IPC, UTS, cgroup namespaces | new | new |
//! | network namespace | the pod's: containerd finds it by this process's id | new, empty |
//! | user namespace | new, with nobody in it | the host's: in another one the kernel refuses device nodes |
//! | PID namespace | new: the shim starts it there | new |
//! | user and group | of its own, used by nothing else | root: it acts as any owner of files |
//! | capabilities | none | those for files, and `CAP_SYS_CHROOT` until the folder has come; `CAP_LINUX_IMMUTABLE` only if the sandbox has it |
//! | root | empty, read-only | empty, read-only; then the shared folder |
//! | `/proc` | none | one of its own process only, for `self/fd` |
//! | session keyring | new, empty | new, empty |
//! | Landlock | opens, connects and signals nothing | opens what is beneath the folder |

mod error;
mod landlock;
mod rights;
mod root;
mod system;

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use error::JailError;
use rights::Capability;
use system::{check, plain};

/// The last descriptor that was given to the process on purpose: the control socket.
const LAST_DESCRIPTOR: libc::c_uint = husk_control::CONTROL_FD.cast_unsigned();

/// Threads and processes that the machine's user may have: 32 vCPUs, and as many of the kernel's own
/// for vhost, with room.
const MACHINE_THREADS: u64 = 512;

/// User ids from here on belong to nobody by systemd's table of ids; process ids are below 2^22.
const FIRST_USER: libc::uid_t = 1_900_000_000;

/// What the file server may do to files that are not its own. `CAP_DAC_READ_SEARCH` is not among
/// them: it opens any file of the file system by its handle, whatever the root is.
const FILE_RIGHTS: [Capability; 8] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::FileOwner,
    Capability::FileSetId,
    Capability::SetGroup,
    Capability::SetUser,
    Capability::MakeNode,
    Capability::SetFileCapabilities,
];

/// A wall that a host may lack. All others are there on every kernel that runs this at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wall {
    /// Landlock.
    Landlock,
}

/// How much of the wall Landlock is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landlock {
    /// All that is asked for: files, TCP, signals, abstract sockets.
    Whole,
    /// Files at least; this kernel does not know all the rest.
    Partly,
    /// Nothing, which was accepted.
    Missing,
}

/// Takes from the calling process, which runs a machine, all that a machine does not need. A wall
/// that is missing is an error unless it is one of `accept_missing`.
pub fn enter_machine(accept_missing: &[Wall]) -> Result<Landlock, JailError> {
    begin()?;
    let user = FIRST_USER.saturating_add(system::process_id()?);
    system::limit(libc::RLIMIT_NPROC, MACHINE_THREADS)?;
    system::unshare(SHARED_BY_BOTH)?;
    root::leave_for_nothing()?;
    // Keeps the right to make a user namespace, which a host may refuse to users.
    rights::keep_over_user_change()?;
    rights::become_user(user)?;
    system::unshare(libc::CLONE_NEWUSER)?;
    rights::bound(&[])?;
    rights::keep_only(&[])?;
    end()?;
    landlock::allow_nothing(accept_missing.contains(&Wall::Landlock))
}

/// The jail of a file server, to be closed when it has got its folder.
#[derive(Debug)]
pub struct FilesJail {
    descriptors: File,
    without_landlock: bool,
    immutable_flags: bool,
}

/// Takes from the calling process, which is to serve files, all that it does not need for it. A wall
/// that is missing is an error unless it is one of `accept_missing`.
pub fn enter_files(accept_missing: &[Wall]) -> Result<FilesJail, JailError> {
    begin()?;
    system::raise_descriptor_limit()?;
    system::unshare(SHARED_BY_BOTH | libc::CLONE_NEWNET)?;
    let descriptors = root::own_descriptors()?;
    root::leave_for_nothing()?;
    // Serving threads change their file system user for each request.
    rights::keep_over_user_change()?;
    let mut rights = FILE_RIGHTS.to_vec();
    rights.extend([Capability::ChangeRoot, Capability::LinuxImmutable]);
    rights::bound(&FILE_RIGHTS)?;
    rights::keep_only(&rights)?;
    end()?;
    let without_landlock = accept_missing.contains(&Wall::Landlock);
    Ok(FilesJail { descriptors, without_landlock, immutable_flags: false })
}

impl FilesJail {
    /// Keeps `CAP_LINUX_IMMUTABLE` if `granted`, for files of the host's on volumes.
    pub fn with_immutable_flags(self, granted: bool) -> Self {
        Self { immutable_flags: granted, ..self }
    }

    /// Makes `folder` the root, above which `..` does not lead, and gives away the right to do so
    /// again. To be called before there are other threads.
    pub fn close(self, folder: BorrowedFd<'_>) -> Result<File, JailError> {
        // SAFETY: a descriptor by number, and a terminated path.
        plain("enter the shared folder", unsafe { libc::fchdir(folder.as_raw_fd()) })?;
        // SAFETY: a terminated path.
        plain("make the shared folder the root", unsafe { libc::chroot(c".".as_ptr()) })?;
        let mut rights = FILE_RIGHTS.to_vec();
        if self.immutable_flags {
            rights.push(Capability::LinuxImmutable);
        }
        rights::keep_only(&rights)?;
        landlock::allow_beneath(folder, self.without_landlock)?;
        Ok(self.descriptors)
    }
}

const SHARED_BY_BOTH: libc::c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

fn begin() -> Result<(), JailError> {
    // SAFETY: no memory is involved. Descriptors that the shim has left open by mistake are nobody's
    // here: the process has only begun.
    check("close descriptors", unsafe {
        libc::syscall(libc::SYS_close_range, LAST_DESCRIPTOR + 1, libc::c_uint::MAX, 0)
    })?;
    system::leave_keys()?;
    system::empty_environment()?;
    system::limit(libc::RLIMIT_CORE, 0)
}

fn end() -> Result<(), JailError> {
    // A change of user has reset it to what the host's core dump settings say.
    // SAFETY: plain numbers.
    plain("stop being dumpable", unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    // SAFETY: plain numbers.
    plain("refuse new privileges", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}
