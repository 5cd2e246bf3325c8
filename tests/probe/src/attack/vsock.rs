//! Ports of the host's, by vsock.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, VsockAddr, connect, getsockopt, send, socket,
    sockopt,
};

use super::Until;
use super::numbers::Numbers;

/// Connections under way at once.
const BATCH: usize = 128;

fn start(cid: u32, port: u32) -> Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let end = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    match connect(end.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(Some(end)),
        // Nobody of that number, or nobody there.
        Err(_) => Ok(None),
    }
}

/// Ports below this are tried one after the other: those of two bytes, and some beyond.
const ALL_BELOW: u32 = 70_000;

/// Tries ports for as long as there is time: first those that are likely to be somebody's, then all below
/// [`ALL_BELOW`], from one of them on. Prints which answered.
pub fn ports(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let likely = (0..0x500).chain(0x1_0000..0x1_0080).chain(0xbfff_ffc0..0xc000_0040).rev();
    let mut likely: Vec<(u32, u32)> = likely.map(|port| (2, port)).collect();
    likely.extend([0, 1, 4, u32::MAX].into_iter().flat_map(|cid| [(cid, 1), (cid, 1024)]));
    let mut next = u32::try_from(numbers.below(ALL_BELOW.into()))?;
    let mut tried = 0;
    while until.goes_on() {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            let (cid, port) = likely.pop().unwrap_or_else(|| {
                next = (next + 1) % ALL_BELOW;
                (2, next)
            });
            tried += 1;
            if let Some(end) = start(cid, port)? {
                batch.push((cid, port, end));
            } else if tried % 4096 == 0 && !until.goes_on() {
                break;
            }
        }
        for (cid, port, end) in &batch {
            let mut wanted = [PollFd::new(end.as_fd(), PollFlags::POLLOUT)];
            let ready = poll(&mut wanted, PollTimeout::from(2000_u16))?;
            if ready == 1 && getsockopt(end, sockopt::SocketError)? == 0 {
                println!("answered: {cid}:{port}");
            }
        }
    }
    println!("tried {tried}");
    Ok(())
}

/// Connections that are given up before they are answered, and many that are left open.
pub fn flood(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let mut open = Vec::new();
    while until.goes_on() {
        let port = u32::try_from(numbers.below(0x1_0100))?;
        match start(2, port) {
            Ok(Some(end)) if numbers.one_in(2) && open.len() < 900 => open.push(end),
            Ok(_) => {}
            Err(_) => open.clear(),
        }
    }
    println!("open {}", open.len());
    Ok(())
}

/// So many ports from the first that a process's streams ever had.
const STREAMS: std::ops::Range<u32> = 0x1_0000..0x1_0400;

/// Dials the ports where streams of processes might come to, over and over, and says into each that answers
/// what no process has said. Prints which answered.
pub fn streams(until: &Until) -> Result<()> {
    let mut tried = 0;
    let mut ports = STREAMS.cycle();
    while until.goes_on() {
        let mut batch = Vec::new();
        for port in ports.by_ref().take(BATCH) {
            tried += 1;
            batch.extend(start(2, port)?.map(|end| (port, end)));
        }
        for (port, end) in batch {
            let mut wanted = [PollFd::new(end.as_fd(), PollFlags::POLLOUT)];
            let ready = poll(&mut wanted, PollTimeout::from(2000_u16))?;
            if ready == 1 && getsockopt(&end, sockopt::SocketError)? == 0 {
                println!("answered: {port}");
                // Whoever hears it may hang up meanwhile.
                let _ = send(end.as_raw_fd(), b"taken\n", MsgFlags::MSG_NOSIGNAL);
            }
        }
    }
    println!("tried {tried}");
    Ok(())
}
