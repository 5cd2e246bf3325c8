//! One queue of a tap, behind a descriptor that came ready-made.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::header::HEADER;

/// What a tap's descriptor must have been attached with.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a descriptor is not taken for a queue.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("the descriptor is no tap, or attached to none")]
    None(#[source] io::Error),
    /// Attached otherwise.
    #[error(
        "the tap must be attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, with several queues also \
         with IFF_MULTI_QUEUE"
    )]
    Flags,
    /// A call failed.
    #[error("the tap could not {what}")]
    Call {
        /// What it was to do.
        what: &'static str,
        /// Why it did not.
        source: io::Error,
    },
}

/// A queue.
pub struct Tap {
    fd: OwnedFd,
    /// A real one; otherwise a socket for tests, which knows nothing of offloads and queues.
    real: bool,
    /// The kernel sends it frames of its own choice.
    attached: bool,
}

impl Tap {
    /// A queue of a tap, one of several if `multi`.
    pub fn new(fd: OwnedFd, multi: bool) -> Result<Self, TapError> {
        // SAFETY: all zeroes is an empty request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is that of a request, which this call fills.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
        check(result).map_err(TapError::None)?;
        // SAFETY: the call has filled in the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = FLAGS | if multi { libc::IFF_MULTI_QUEUE } else { 0 };
        if flags & wanted != wanted {
            return Err(TapError::Flags);
        }
        let tap = Self { fd, real: true, attached: true };
        set_nonblocking(&tap.fd)
            .map_err(|source| TapError::Call { what: "be made non-blocking", source })?;
        // HEADER is 12.
        let length: libc::c_int = 12;
        debug_assert_eq!(HEADER, 12);
        tap.call(libc::TUNSETVNETHDRSZ as _, &length)
            .map_err(|source| TapError::Call { what: "take virtio 1 headers", source })?;
        Ok(tap)
    }

    /// A stand-in for tests and fuzzing: a datagram or packet socket on which each message is a
    /// header and a frame.
    pub fn stand_in(socket: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&socket)?;
        Ok(Self { fd: socket, real: false, attached: true })
    }

    /// Whether it can cut UDP into segments (Linux 6.2). Changes the offloads.
    pub fn has_udp_segments(&self) -> bool {
        self.real
            && self.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok()
    }

    /// What the reader of the tap can do without the kernel: `TUN_F_*`.
    pub fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        // SAFETY: the argument is a number, not a pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, flags) })
    }

    /// Whether the kernel gives this queue frames; one of several is switched off while the guest
    /// does not use it.
    pub fn attach(&mut self, wanted: bool) -> io::Result<()> {
        if self.attached == wanted {
            return Ok(());
        }
        if self.real {
            // SAFETY: all zeroes is an empty request.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            let flag = if wanted { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            // Both flags are below 0x8000.
            request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or(0);
            self.call(libc::TUNSETQUEUE as _, &request)?;
        }
        self.attached = wanted;
        Ok(())
    }

    /// Reads a frame with its header into mapped pieces; `None` if there is none now.
    ///
    /// # Safety
    /// The pieces must be mapped, and nothing in this process may rely on their contents.
    pub unsafe fn read(&self, pieces: &[libc::iovec]) -> io::Result<Option<usize>> {
        // The caller has no more than 1024, which is what the kernel takes.
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pieces are mapped, as the caller promises.
        repeat(|| unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), count) })
    }

    /// Writes a frame with its header from mapped pieces; `None` if there is no room now.
    ///
    /// # Safety
    /// The pieces must be mapped.
    pub unsafe fn write(&self, pieces: &[libc::iovec]) -> io::Result<Option<usize>> {
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pieces are mapped, as the caller promises.
        repeat(|| unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), count) })
    }

    fn call<T>(&self, request: libc::Ioctl, argument: &T) -> io::Result<()> {
        // SAFETY: the requests used here read what `argument` points to, which is of their type.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_ref(argument)) };
        check(result)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: calls with plain numbers on a descriptor that is ours.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn repeat(mut call: impl FnMut() -> isize) -> io::Result<Option<usize>> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(Some(count));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
