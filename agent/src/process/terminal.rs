//! A process's terminal: its master end is relayed both ways. Terminals cannot be spliced.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{read, write};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::init::calls;
use crate::process::outlet::linger;

const CHUNK: usize = 32 << 10;
/// How long an exit waits for the last output of a terminal that others keep open.
const SETTLE: Duration = Duration::from_millis(200);

/// A running relay; dropping it hangs the terminal up.
#[derive(Debug)]
pub struct Terminal {
    master: Arc<AsyncFd<OwnedFd>>,
    read: Arc<AtomicU64>,
    drained: watch::Receiver<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Terminal {
    /// Relays between `master` and the connected sockets.
    pub fn start(
        master: OwnedFd,
        input: Option<AsyncFd<OwnedFd>>,
        output: Option<AsyncFd<OwnedFd>>,
    ) -> io::Result<Self> {
        let master = Arc::new(calls::watch(master, Interest::READABLE | Interest::WRITABLE)?);
        let read = Arc::new(AtomicU64::new(0));
        let (sender, drained) = watch::channel(false);
        let mut tasks = Vec::new();
        if let Some(socket) = input {
            let master = Arc::clone(&master);
            tasks.push(tokio::spawn(async move {
                // An end of input leaves the terminal open, as it does on a real one.
                let _ = feed(&socket, &master).await;
            }));
        }
        let (terminal, counter) = (Arc::clone(&master), Arc::clone(&read));
        tasks.push(tokio::spawn(async move {
            let end = forward(&terminal, output.as_ref(), &counter).await;
            let _ = sender.send(true);
            if let (Ok(()), Some(socket)) = (end, output) {
                linger(&socket).await;
            }
        }));
        Ok(Self { master, read, drained, tasks })
    }

    /// Waits until all output of a process that has exited was read, or until it is clear that
    /// another process keeps the terminal open.
    pub async fn settle(mut drained: watch::Receiver<bool>) {
        // Either way the count is as good as it gets.
        let _ = tokio::time::timeout(SETTLE, drained.wait_for(|done| *done)).await;
    }

    /// What [`Terminal::settle`] waits on.
    pub fn drained(&self) -> watch::Receiver<bool> {
        self.drained.clone()
    }

    /// Bytes the process has written, as far as the terminal shows them.
    pub fn produced(&self) -> u64 {
        let waiting = if *self.drained.borrow() {
            0
        } else {
            rustix::io::ioctl_fionread(self.master.get_ref()).unwrap_or(0)
        };
        self.read.load(Ordering::Relaxed) + waiting
    }

    /// Sets the size in characters.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        resize(self.master.get_ref(), rows, columns)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Sets the size of the terminal of `master` in characters.
pub fn resize(master: &OwnedFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(master, size)?)
}

async fn forward(
    master: &AsyncFd<OwnedFd>,
    output: Option<&AsyncFd<OwnedFd>>,
    counter: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0u8; CHUNK];
    loop {
        let count = match read(master.get_ref(), &mut buffer) {
            // EIO: the last one who had the terminal open is gone.
            Ok(0) | Err(Errno::EIO) => return Ok(()),
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                master.readable().await?.clear_ready();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        counter.fetch_add(count as u64, Ordering::Relaxed);
        let mut rest = &buffer[..count];
        while let (false, Some(socket)) = (rest.is_empty(), output) {
            match send(socket.get_ref().as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => socket.writable().await?.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        tokio::task::consume_budget().await;
    }
}

async fn feed(socket: &AsyncFd<OwnedFd>, master: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0u8; CHUNK];
    loop {
        let count = match recv(socket.get_ref().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                socket.readable().await?.clear_ready();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match write(master.get_ref(), rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => master.writable().await?.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        tokio::task::consume_budget().await;
    }
}
