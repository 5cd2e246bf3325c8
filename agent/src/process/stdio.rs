//! The standard streams of a process to be: pipes for it, sockets to the host, relays between.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Uid, fchown, pipe2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::host::{Address, Host, connected};
use crate::init::calls;
use crate::process::inlet::Inlet;
use crate::process::outlet::Outlet;
use crate::process::terminal::{self, Terminal};

/// Larger than the default of 64 KiB: fewer turns of the relay for the same bytes.
const PIPE_SIZE: i32 = 256 << 10;

/// The streams that the host asks for; one without an address is `/dev/null`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    /// Where standard input comes from.
    pub input: Option<Address>,
    /// Where standard output goes to.
    pub output: Option<Address>,
    /// Where standard error goes to; not with a terminal.
    pub error: Option<Address>,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// The terminal's size in characters; 0 leaves the kernel's default.
    pub rows: u16,
    /// See `rows`.
    pub columns: u16,
}

/// What the process gets as descriptors 0, 1 and 2.
#[derive(Debug)]
pub struct Stdio {
    /// Descriptor 0.
    pub input: OwnedFd,
    /// Descriptor 1.
    pub output: OwnedFd,
    /// Descriptor 2.
    pub error: OwnedFd,
}

#[derive(Debug)]
struct Link {
    socket: AsyncFd<OwnedFd>,
    /// Our end of the process's pipe; none with a terminal.
    pipe: Option<OwnedFd>,
}

/// The agent's side of the streams, while the process is being made.
#[derive(Debug)]
pub struct Links {
    request: Request,
    input: Option<Link>,
    output: Option<Link>,
    error: Option<Link>,
}

/// Dials the host for each stream and makes the pipes, owned by `owner` so that the process may
/// open them again through `/dev/stdout`.
pub fn open(host: &Host, request: Request, owner: Uid) -> io::Result<(Stdio, Links)> {
    let mut links = Links { request, input: None, output: None, error: None };
    if request.terminal {
        links.input = dial(host, request.input)?.map(|socket| Link { socket, pipe: None });
        links.output = dial(host, request.output)?.map(|socket| Link { socket, pipe: None });
        return Ok((Stdio { input: null()?, output: null()?, error: null()? }, links));
    }
    let mut stdio = Stdio { input: null()?, output: null()?, error: null()? };
    if let Some(socket) = dial(host, request.input)? {
        let (reader, writer) = pipe(owner)?;
        unblock(&writer)?;
        stdio.input = reader;
        links.input = Some(Link { socket, pipe: Some(writer) });
    }
    for (address, theirs, link) in [
        (request.output, &mut stdio.output, &mut links.output),
        (request.error, &mut stdio.error, &mut links.error),
    ] {
        if let Some(socket) = dial(host, address)? {
            let (reader, writer) = pipe(owner)?;
            unblock(&reader)?;
            *theirs = writer;
            *link = Some(Link { socket, pipe: Some(reader) });
        }
    }
    Ok((stdio, links))
}

fn dial(host: &Host, address: Option<Address>) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    let Some(address) = address else { return Ok(None) };
    Ok(Some(calls::watch(host.dial(address)?, Interest::READABLE | Interest::WRITABLE)?))
}

fn pipe(owner: Uid) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    fchown(&reader, Some(owner), None)?;
    // A smaller pipe does as well.
    let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
    Ok((reader, writer))
}

fn null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

fn unblock(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

impl Links {
    /// Returns the request.
    pub fn request(&self) -> Request {
        self.request
    }

    /// Waits until the host has taken every stream.
    pub async fn connected(&self) -> io::Result<()> {
        for link in [&self.input, &self.output, &self.error].into_iter().flatten() {
            connected(&link.socket).await?;
        }
        Ok(())
    }

    /// Starts the relays; `master` is the terminal's if there is one.
    pub fn relay(self, master: Option<OwnedFd>) -> io::Result<Relays> {
        if let Some(master) = master {
            unblock(&master)?;
            if self.request.rows != 0 && self.request.columns != 0 {
                terminal::resize(&master, self.request.rows, self.request.columns)?;
            }
            let [input, output] = [self.input, self.output].map(|link| link.map(|l| l.socket));
            let terminal = Terminal::start(master, input, output)?;
            return Ok(Relays { terminal: Some(terminal), ..Relays::default() });
        }
        let outlet = |link: Option<Link>| match link {
            Some(Link { socket, pipe: Some(pipe) }) => Outlet::start(pipe, socket).map(Some),
            _ => Ok(None),
        };
        let input = match self.input {
            Some(Link { socket, pipe: Some(pipe) }) => Some(Inlet::start(socket, pipe)?),
            _ => None,
        };
        Ok(Relays {
            input,
            output: outlet(self.output)?,
            error: outlet(self.error)?,
            terminal: None,
        })
    }
}

/// The running relays of a process; dropping them closes its streams.
#[derive(Debug, Default)]
pub struct Relays {
    input: Option<Inlet>,
    output: Option<Outlet>,
    error: Option<Outlet>,
    terminal: Option<Terminal>,
}

impl Relays {
    /// Bytes the process has written to its standard output and error.
    pub fn produced(&self) -> (u64, u64) {
        let count = |outlet: &Option<Outlet>| outlet.as_ref().map_or(0, Outlet::produced);
        match &self.terminal {
            Some(terminal) => (terminal.produced(), 0),
            None => (count(&self.output), count(&self.error)),
        }
    }

    /// Closes standard input once what has come is delivered. A terminal stays as it is.
    pub fn close_input(&self) {
        if let Some(input) = &self.input {
            input.close();
        }
    }

    /// The terminal, if there is one.
    pub fn terminal(&self) -> Option<&Terminal> {
        self.terminal.as_ref()
    }
}
