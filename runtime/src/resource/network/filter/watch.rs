//! News of changed tables of nftables. The older iptables has no such news.

use std::io;

use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

use super::netlink::NETLINK_NETFILTER;

/// `NFNLGRP_NFTABLES`
const GROUP: u32 = 7;
/// What the news say does not matter, and is cut off.
const SOME: usize = 64;

/// A subscription in the namespace of the thread that opened it.
pub struct Watch(TokioSocket);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Fails if the kernel has no nftables.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(GROUP)?;
        Ok(Self(socket))
    }

    /// Waits until something has changed, and takes all news that are there; false when nothing more will be
    /// heard.
    pub async fn changed(&self) -> bool {
        match self.0.recv(&mut Vec::with_capacity(SOME)).await {
            Ok(_) => {}
            // More than there was room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(_) => return false,
        }
        while self.0.socket_ref().recv(&mut Vec::with_capacity(SOME), libc::MSG_DONTWAIT).is_ok() {}
        true
    }
}
