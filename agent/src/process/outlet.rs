//! From a process's pipe to the host: bytes are spliced, never seen by the agent, and counted.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use std::os::fd::AsRawFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::init::calls;
use crate::process::readiness::{Wait, wait};

/// At most this much in one splice; the pipe holds less.
const CHUNK: usize = 1 << 20;

/// A running relay; dropping it closes both ends.
#[derive(Debug)]
pub struct Outlet {
    forwarded: Arc<AtomicU64>,
    // The task owns the pipe: when it ends early the process must see a broken pipe.
    pipe: Weak<AsyncFd<OwnedFd>>,
    task: JoinHandle<()>,
}

impl Outlet {
    /// Relays from the non-blocking `pipe` to the connected `socket` until the pipe's last writer
    /// is gone or the host hangs up.
    pub fn start(pipe: OwnedFd, socket: AsyncFd<OwnedFd>) -> io::Result<Self> {
        let pipe = Arc::new(calls::watch(pipe, Interest::READABLE)?);
        let forwarded = Arc::new(AtomicU64::new(0));
        let (weak, counter) = (Arc::downgrade(&pipe), Arc::clone(&forwarded));
        let task = tokio::spawn(async move {
            let end = forward(&pipe, &socket, &counter).await;
            drop(pipe);
            if end.is_ok() {
                linger(&socket).await;
            }
        });
        Ok(Self { forwarded, pipe: weak, task })
    }

    /// Bytes the process has written: forwarded, and waiting in the pipe.
    pub fn produced(&self) -> u64 {
        let waiting = self.pipe.upgrade().map_or(0, |pipe| waiting(&pipe));
        self.forwarded.load(Ordering::Relaxed) + waiting
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn waiting(pipe: &AsyncFd<OwnedFd>) -> u64 {
    rustix::io::ioctl_fionread(pipe.get_ref()).unwrap_or(0)
}

async fn forward(
    pipe: &AsyncFd<OwnedFd>,
    socket: &AsyncFd<OwnedFd>,
    forwarded: &AtomicU64,
) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        match splice(pipe.get_ref(), None, socket.get_ref(), None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                forwarded.fetch_add(count as u64, Ordering::Relaxed);
                tokio::task::consume_budget().await;
            }
            Err(Errno::EINTR) => {}
            // Readiness is taken back before the next try, so what comes in between is seen by it.
            Err(Errno::EAGAIN) => match wait(pipe.get_ref(), socket.get_ref())? {
                Wait::Source => tokio::select! {
                    ready = pipe.readable() => ready?.clear_ready(),
                    hung_up = hung_up(socket) => return Err(hung_up),
                },
                Wait::Sink => socket.writable().await?.clear_ready(),
                Wait::Neither => tokio::task::consume_budget().await,
            },
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until the host has closed its end, to which nothing can be sent any more. It never sends anything.
async fn hung_up(socket: &AsyncFd<OwnedFd>) -> io::Error {
    let mut sink = [0u8; 512];
    loop {
        match recv(socket.get_ref().as_raw_fd(), &mut sink, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Errno::EPIPE.into(),
            Err(Errno::EAGAIN) => match socket.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return error,
            },
            Ok(_) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            Err(error) => return error.into(),
        }
    }
}

/// Says that no more will come, and keeps the socket until the host has closed its end: closing at
/// once could overtake the last bytes.
pub async fn linger(socket: &AsyncFd<OwnedFd>) {
    if shutdown(socket.get_ref().as_raw_fd(), Shutdown::Write).is_err() {
        return;
    }
    let mut sink = [0u8; 512];
    loop {
        match recv(socket.get_ref().as_raw_fd(), &mut sink, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => match socket.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return,
            },
            Ok(count) if count > 0 => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::pipe2;
    use std::os::fd::AsFd;
    use std::time::Duration;

    #[tokio::test]
    async fn a_host_that_hangs_up_breaks_the_pipe_before_anything_is_written() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).expect("pipe");
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("non-blocking");
        let interest = Interest::READABLE | Interest::WRITABLE;
        let socket = calls::watch(OwnedFd::from(ours), interest).expect("watched");
        let _outlet = Outlet::start(reader, socket).expect("started");
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(theirs);
        let broken = async {
            loop {
                let mut fds = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
                poll(&mut fds, PollTimeout::ZERO).expect("polled");
                if fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), broken).await.expect("broken");
    }
}
