//! Processes by descriptor: a number may be another process by now, a descriptor never is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

/// A process held by descriptor; readable once it has exited.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens a process by number. For a child that has not been waited for there is no race.
    pub fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: the call takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a signal; `ESRCH` once the process has been waited for.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is ours and open; a null `info` is allowed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal as libc::c_int,
                info,
                0,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Lets the event loop watch a descriptor that its owner gives up for good.
pub(crate) fn watched_fd<T: AsRawFd + OwnsDescriptor>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `owner` owns its descriptor, always names the same one, and closes it only when it is
    // dropped, which the watcher does after it has stopped watching.
    unsafe { AsyncFd::register(owner) }.map_err(io::Error::from)
}

/// Types that own one descriptor for as long as they live.
pub(crate) trait OwnsDescriptor {}

impl OwnsDescriptor for OwnedFd {}
impl OwnsDescriptor for PidFd {}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
