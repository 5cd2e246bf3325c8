//! System calls on the UNIX stream sockets behind devices. Nothing here blocks.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::chain::Segments;

/// Wanted of the kernel per direction; it gives what `net.core.wmem_max` allows.
const SEND_BUFFER: libc::c_int = 1 << 20;

/// A connected pair: ours, theirs.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made both, and nobody else knows them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    widen(&ours);
    widen(&theirs);
    Ok((ours, theirs))
}

/// Lets more bytes be under way from this end. Only for speed, so that a failure does not matter.
pub fn widen(socket: &OwnedFd) {
    let size = std::ptr::from_ref(&SEND_BUFFER).cast();
    // SAFETY: pointer and length are those of one integer.
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, size, 4);
    }
}

/// Sends pieces of guest memory; `None` if there is no room now.
pub fn send_segments(socket: &OwnedFd, data: &Segments) -> io::Result<Option<usize>> {
    // SAFETY: the segments lie in guest memory, which their chain keeps mapped. The guest may change
    // them meanwhile, which only changes what is sent.
    unsafe { send(socket, data.iovecs()) }
}

/// Sends bytes; `None` if there is no room now.
pub fn send_bytes(socket: &OwnedFd, bytes: &[u8]) -> io::Result<Option<usize>> {
    let base = bytes.as_ptr().cast_mut().cast();
    // SAFETY: the segment is the slice; sending only reads it.
    unsafe { send(socket, &[libc::iovec { iov_base: base, iov_len: bytes.len() }]) }
}

/// Sends mapped segments; `None` if there is no room now.
///
/// # Safety
/// The segments must be mapped.
pub unsafe fn send(socket: &OwnedFd, iovecs: &[libc::iovec]) -> io::Result<Option<usize>> {
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    loop {
        // SAFETY: the message describes mapped segments, as the caller promises, and sending does
        // not change the list.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        match check(sent) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return later(result),
        }
    }
}

/// Receives into mapped segments; `None` if nothing is there now, `Some(0)` at the end.
///
/// # Safety
/// The segments must be mapped, and nothing in this process may rely on their contents.
pub unsafe fn receive(socket: &OwnedFd, iovecs: &[libc::iovec]) -> io::Result<Option<usize>> {
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    loop {
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the message describes mapped segments, as the caller promises.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        match check(got) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return later(result),
        }
    }
}

/// Ends a direction, as far as it has not ended.
pub fn shutdown(socket: &OwnedFd, how: libc::c_int) {
    // SAFETY: no memory is involved. A failure means that it is shut already.
    unsafe {
        libc::shutdown(socket.as_raw_fd(), how);
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn later(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
        Ok(count) => Ok(Some(count)),
    }
}
