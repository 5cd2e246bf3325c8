//! The way to the host: its vsock ports, or UNIX sockets in a directory for the component tests.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, bind, connect,
    getsockopt, socket, sockopt::SocketError,
};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::init::calls;

/// The host's context id, fixed by the vsock protocol.
const HOST_CID: u32 = 2;

/// How long a connection may take; the host takes or refuses it in microseconds.
const CONNECT_SECONDS: i64 = 30;

/// Where a stream comes to, and where from: the host takes it from nowhere else, so that no other process
/// of the guest can take it, though any may dial any port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The host's port.
    pub port: u32,
    /// The agent's port; `None` for any.
    pub from: Option<u32>,
}

impl Address {
    /// The host's `port`, from any of the agent's.
    pub fn open(port: u32) -> Self {
        Self { port, from: None }
    }
}

/// Where the host's ports are.
#[derive(Debug, Clone)]
pub enum Host {
    /// The machine's vsock device.
    Vsock,
    /// Sockets named by their port.
    Directory(PathBuf),
}

impl Host {
    /// Where sysfs is: what is written there changes the machine.
    pub fn sys(&self) -> PathBuf {
        match self {
            Host::Vsock => "/sys".into(),
            Host::Directory(directory) => directory.join("sys"),
        }
    }

    /// Where kernel parameters are.
    pub fn parameters(&self) -> PathBuf {
        match self {
            Host::Vsock => "/proc/sys".into(),
            Host::Directory(directory) => directory.join("parameters"),
        }
    }

    /// Begins a connection to `address`; [`connected`] or [`stream`] waits for it. The descriptor does not
    /// block.
    pub fn dial(&self, Address { port, from }: Address) -> io::Result<OwnedFd> {
        match self {
            Host::Vsock => {
                let own = from.map(|from| VsockAddr::new(libc::VMADDR_CID_ANY, from));
                begin(AddressFamily::Vsock, own, &VsockAddr::new(HOST_CID, port))
            }
            Host::Directory(directory) => {
                let address = UnixAddr::new(&directory.join(port.to_string()))?;
                begin(AddressFamily::Unix, None, &address)
            }
        }
    }
}

fn begin(
    family: AddressFamily,
    own: Option<VsockAddr>,
    address: &dyn SockaddrLike,
) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    if family == AddressFamily::Vsock {
        // Without it the kernel's own patience has to do.
        let _ = calls::be_patient(fd.as_fd(), CONNECT_SECONDS);
    }
    if let Some(own) = own {
        bind(fd.as_raw_fd(), &own)?;
    }
    match connect(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(e) => Err(e.into()),
    }
}

/// A dialled socket as a stream, once it is connected.
pub async fn stream(socket: OwnedFd) -> io::Result<UnixStream> {
    // A UnixStream only by name: it reads and writes whatever stream socket it is given.
    let stream = UnixStream::from_std(socket.into())?;
    stream.writable().await?;
    stream.take_error()?.map_or(Ok(stream), Err)
}

/// Waits until a dialled socket is connected, or says why it cannot be.
pub async fn connected(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    // The readiness stays set: the first write finds it.
    let _ready = socket.writable().await?;
    match getsockopt(socket.get_ref(), SocketError)? {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
