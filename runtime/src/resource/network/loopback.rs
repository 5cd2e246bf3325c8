//! What dials the namespace's loopback addresses on the host: the CRI's port forwarding does.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use husk_bpf::steer::{Addresses, Protocol, Rule, steer};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt::IpFreebind,
};
use tokio::net::TcpStream;

use super::Namespace;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Accepts every TCP connection to a loopback address of a namespace, whatever its port.
#[derive(Debug)]
pub struct Loopback {
    ipv4: tokio::net::TcpListener,
    ipv6: Option<tokio::net::TcpListener>,
    _steering: OwnedFd,
}

impl Loopback {
    /// From now on, in `namespace`. Where the kernel has no such programs (before Linux 5.9) it is an
    /// error.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let (ipv4, ipv6) = namespace.within(|| {
            let ipv4 = listener(AddressFamily::Inet, Ipv4Addr::LOCALHOST.into())?;
            // There may be no IPv6.
            Ok((ipv4, listener(AddressFamily::Inet6, Ipv6Addr::LOCALHOST.into()).ok()))
        })?;
        let rule = |to, socket| Rule { protocol: Protocol::Tcp, to, port: None, socket };
        let all = Addresses::V4(Ipv4Addr::LOCALHOST, Ipv4Addr::new(255, 0, 0, 0));
        let mut rules = vec![rule(all, ipv4.as_fd())];
        rules.extend(ipv6.as_ref().map(|it| rule(Addresses::V6(Ipv6Addr::LOCALHOST), it.as_fd())));
        let steering = steer(namespace.as_fd(), &rules)?;
        let watched = tokio::net::TcpListener::from_std;
        Ok(Self { ipv4: watched(ipv4)?, ipv6: ipv6.map(watched).transpose()?, _steering: steering })
    }

    /// The next connection, and the address that it was made to.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let second = async {
            match &self.ipv6 {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let (stream, _) = tokio::select! {
            first = self.ipv4.accept() => first?,
            second = second => second?,
        };
        let dialled = stream.local_addr()?;
        Ok((stream, dialled))
    }
}

/// On a port that nobody needs to know. The address need not be there yet.
fn listener(family: AddressFamily, address: IpAddr) -> io::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, IpFreebind, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, 0)))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}
