//! Taps: one end in the namespace, the other a descriptor per queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{Namespace, NetworkError};

const DEVICE: &str = "/dev/net/tun";
/// What the names of our taps begin with; the index of the interface that one carries follows.
const PREFIX: &str = "husk";

/// `linux/if_tun.h`: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// A tap whose interface goes with the last of its descriptors.
#[derive(Debug)]
pub struct Tap {
    /// Its name in the namespace.
    pub name: String,
    /// A descriptor per queue.
    pub queues: Vec<OwnedFd>,
}

/// Whether an interface is a tap of Husk's.
pub fn is_tap_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.parse::<u32>().is_ok())
}

impl Tap {
    /// The tap for the interface of that index, as the machine wants it: with headers that carry
    /// checksums and segments yet to be made.
    pub fn create(namespace: &Namespace, index: u32, queues: usize) -> Result<Self, NetworkError> {
        let name = format!("{PREFIX}{index}");
        // The device remembers the namespace it was opened in.
        let queues = namespace
            .within(|| (0..queues).map(|_| attach(&name, queues > 1)).collect())
            .map_err(NetworkError::Tap)?;
        Ok(Self { name, queues })
    }
}

fn attach(name: &str, several: bool) -> io::Result<OwnedFd> {
    let file: File =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let flags = if several { flags | libc::IFF_MULTI_QUEUE } else { flags };
    let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
    // One byte stays 0: it is a C string. Our names are shorter: 4 letters, 10 digits.
    let room = request.name.len() - 1;
    let length = name.len().min(room);
    request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
    // SAFETY: the kernel reads one `struct ifreq` (40 bytes), which `request` is, and writes the
    // name into it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert!(is_tap_name("husk12"));
        for other in ["husk", "husky", "husk-1", "eth0", "tap0"] {
            assert!(!is_tap_name(other), "{other}");
        }
        assert_eq!(size_of::<InterfaceRequest>(), size_of::<libc::ifreq>());
    }
}
