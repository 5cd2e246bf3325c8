//! How a terminal comes from the container, where it is opened, to the agent, which relays it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, fchown};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

const NAME: &str = "console.sock";

/// Where the agent awaits a terminal, if one is to come.
#[derive(Debug)]
pub struct Console {
    listener: Option<(UnixListener, PathBuf)>,
}

/// `directory/name`, short enough for a socket address while the descriptor lives.
fn short(directory: &Path, name: &str) -> io::Result<(File, PathBuf)> {
    let directory = File::open(directory)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()));
    Ok((directory, path))
}

impl Console {
    /// Listens in `directory` if a terminal is wanted.
    pub fn listen(directory: &Path, wanted: bool) -> io::Result<Self> {
        if !wanted {
            return Ok(Self { listener: None });
        }
        let (_directory, path) = short(directory, NAME)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: Some((listener, directory.join(NAME))) })
    }

    /// The socket's path, for the helper.
    pub fn path(&self) -> Option<PathBuf> {
        self.listener.as_ref().map(|(_, path)| path.clone())
    }

    /// The terminal's master end, which was sent before the helper reported. The other end becomes
    /// `owner`'s.
    pub fn master(&self, owner: Uid) -> io::Result<Option<OwnedFd>> {
        let Some((listener, _)) = &self.listener else { return Ok(None) };
        let (stream, _) = listener.accept()?;
        let master = receive(&stream)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        // Fails for what is not a terminal's master.
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        fchown(&slave, Some(owner), None)?;
        Ok(Some(master))
    }
}

fn receive(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0u8; 4096];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut ancillary, flags)?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no terminal was sent"))
}

/// The helper's way to send a terminal.
#[derive(Debug)]
pub struct Sender(UnixStream);

impl Sender {
    /// Connects to the agent's socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let (_directory, path) = short(path.parent().unwrap_or(path), NAME)?;
        Ok(Self(UnixStream::connect(path)?))
    }

    /// Sends the terminal's master end.
    pub fn send(&self, master: impl AsFd) -> io::Result<()> {
        let descriptors = [master.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        // There is room for one by the line above.
        let _ = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&self.0, &[IoSlice::new(b"terminal")], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
