//! The system calls for which neither nix nor rustix has a safe door.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::ForkResult;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `_IOW('R', 0x03, int[2])` of `linux/random.h`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `SIOCOUTQ` of `linux/sockios.h`: bytes not yet taken by the transport.
const SIOCOUTQ: libc::c_ulong = 0x5411;
/// More than this is not worth a larger buffer: the pool holds 32 bytes.
const ENTROPY_LIMIT: usize = 512;

/// Sends `signal`, real-time ones too, to the process behind the pidfd `process`.
pub fn signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let (fd, nothing) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the one pointer is null, which asks for the siginfo that kill would give.
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, nothing, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends `signal`, real-time ones too, to `pid`, just read from a container's cgroup.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes no pointers.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds `bytes` to the random pool of `device`, credited as full entropy.
pub fn add_entropy(device: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: libc::c_int,
        length: libc::c_int,
        data: [u8; ENTROPY_LIMIT],
    }
    let length = bytes.len().min(ENTROPY_LIMIT);
    let as_int = |n: usize| libc::c_int::try_from(n).unwrap_or(0);
    let mut info =
        PoolInfo { bits: as_int(length * 8), length: as_int(length), data: [0; ENTROPY_LIMIT] };
    info.data[..length].copy_from_slice(&bytes[..length]);
    // SAFETY: the structure is laid out as rand_pool_info and outlives the call; the kernel reads
    // `length` bytes of `data`, which are there.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes written to `socket` that its transport has not taken yet.
pub fn unsent(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int to the address of a living int.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQ, &raw mut bytes) } {
        0 => Ok(u32::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks the helper, which has one thread.
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: called only by the helper role, whose process has a single thread, so the child may
    // go on with everything the parent could.
    unsafe { nix::unistd::fork() }
}

/// Gives every signal its default action and blocks none, as a new process expects it: Rust's
/// start-up ignores SIGPIPE, glibc's posix_spawn two real-time ones, and the agent blocks SIGCHLD.
pub fn default_signals() {
    // What the kernel calls sigaction: handler, flags, restorer, mask; zero is the default action.
    let action = [0u64; 4];
    for signal in 1..=64 {
        let (new, old) = (&raw const action, std::ptr::null_mut::<u64>());
        // SAFETY: `action` is as large as the kernel's structure with a mask of 8 bytes, and lives;
        // nothing is written back. SIGKILL and SIGSTOP are refused, which does no harm.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, 8) };
    }
    // Cannot fail with an empty set.
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

/// Takes over the descriptor `number` that the agent handed to its helper.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: asks about a number only.
    if number <= libc::STDERR_FILENO || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and the agent opened it for this purpose alone, so nothing else owns it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    // A hook that is executed in the container must not hold it.
    fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(descriptor)
}

/// Sets the calling thread's scheduling policy and parameters: sched_setattr(2).
pub fn schedule(attributes: &libc::sched_attr) -> io::Result<()> {
    let (own, no_flags) = (0, 0);
    // SAFETY: the kernel reads as many bytes as the structure's first field says, which is its size.
    let done = unsafe {
        libc::syscall(libc::SYS_sched_setattr, own, std::ptr::from_ref(attributes), no_flags)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns a change of the clock that changes nothing, for [`adjust_clock`].
pub fn no_clock_change() -> libc::timex {
    // SAFETY: all fields are numbers, of which zero is one.
    unsafe { std::mem::zeroed() }
}

/// Changes the clock as `change` says: adjtimex(2).
pub fn adjust_clock(mut change: libc::timex) -> io::Result<()> {
    // SAFETY: the kernel reads and writes one living structure. The answer is the clock's state.
    match unsafe { libc::adjtimex(&raw mut change) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Has tokio watch `fd`.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, stays open and keeps its number as long as it lives, and none of
    // the agent's code puts another in its place.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Gives the vsock connection that `socket` will begin `seconds` instead of the kernel's 2: a host
/// under load may be slower.
pub fn be_patient(socket: BorrowedFd<'_>, seconds: i64) -> io::Result<()> {
    /// `linux/vm_sockets.h`: the level is the address family.
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 8;
    let time = libc::timeval { tv_sec: seconds, tv_usec: 0 };
    let size = libc::socklen_t::try_from(size_of_val(&time)).unwrap_or(0);
    let (fd, option) = (socket.as_raw_fd(), SO_VM_SOCKETS_CONNECT_TIMEOUT);
    // SAFETY: the kernel reads `size` bytes of a living timeval.
    match unsafe { libc::setsockopt(fd, libc::AF_VSOCK, option, (&raw const time).cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
