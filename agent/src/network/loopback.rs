//! Brings `lo` up: a new network namespace, the guest's first one too, has it down.

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// `linux/netlink.h`: a request (1) that is acknowledged (4).
const FLAGS: u16 = 0x1 | 0x4;
/// `linux/rtnetlink.h`.
const RTM_NEWLINK: u16 = 16;
/// `linux/netlink.h`: the acknowledgement; its payload begins with a negative error number.
const NLMSG_ERROR: u16 = 2;
/// `linux/if.h`.
const IFF_UP: u32 = 1;
/// `lo` is the first device of every network namespace.
const LOOPBACK_INDEX: u32 = 1;
const HEADER: usize = 16;

/// Sets `lo` of the calling thread's network namespace up; its addresses come by themselves.
pub fn loopback_up() -> io::Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    send(netlink.as_raw_fd(), &request(), MsgFlags::empty())?;
    let mut answer = [0u8; 256];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    verdict(&answer[..length])
}

/// `nlmsghdr` and `ifinfomsg`.
fn request() -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(FLAGS.to_ne_bytes());
    // Sequence and port: one request on a socket of its own needs neither.
    message.extend([0; 8]);
    // Family, padding, type: any.
    message.extend([0; 4]);
    message.extend(LOOPBACK_INDEX.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message
}

fn verdict(answer: &[u8]) -> io::Result<()> {
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "netlink: answer is cut short");
    let kind = answer.get(4..6).ok_or_else(broken)?;
    let error = answer.get(HEADER..HEADER + 4).ok_or_else(broken)?;
    if u16::from_ne_bytes([kind[0], kind[1]]) != NLMSG_ERROR {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "netlink: no acknowledgement"));
    }
    match i32::from_ne_bytes([error[0], error[1], error[2], error[3]]) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_its_own_length() {
        assert_eq!(request().len(), 32);
    }

    #[test]
    fn answers_are_judged() {
        let mut answer = vec![0u8; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert!(verdict(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(verdict(&answer).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(verdict(&answer[..10]).is_err());
    }
}
