//! From the host to a process's standard input.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::init::calls;
use crate::process::readiness::{Wait, wait};

/// At most this much in one splice; the pipe holds less.
const CHUNK: usize = 1 << 20;

/// A running relay; dropping it closes both ends.
#[derive(Debug)]
pub struct Inlet {
    closing: Arc<Closing>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Closing {
    asked: AtomicBool,
    changed: Notify,
}

impl Inlet {
    /// Relays from the connected `socket` to the non-blocking `pipe` until the host says that no
    /// more will come, or nobody reads the pipe; then the pipe is closed.
    pub fn start(socket: AsyncFd<OwnedFd>, pipe: OwnedFd) -> io::Result<Self> {
        let pipe = calls::watch(pipe, Interest::WRITABLE)?;
        let closing = Arc::new(Closing::default());
        let asked = Arc::clone(&closing);
        let task = tokio::spawn(async move {
            // A relay that fails has closed both its ends, which is all there is to say.
            let _ = feed(&socket, &pipe, &asked).await;
        });
        Ok(Self { closing, task })
    }

    /// Closes the pipe once what has come from the host is in it.
    pub fn close(&self) {
        self.closing.asked.store(true, Ordering::Relaxed);
        self.closing.changed.notify_one();
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn feed(
    socket: &AsyncFd<OwnedFd>,
    pipe: &AsyncFd<OwnedFd>,
    closing: &Closing,
) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        match splice(socket.get_ref(), None, pipe.get_ref(), None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => match wait(socket.get_ref(), pipe.get_ref())? {
                Wait::Neither => tokio::task::consume_budget().await,
                Wait::Sink => pipe.writable().await?.clear_ready(),
                Wait::Source if closing.asked.load(Ordering::Relaxed) => return Ok(()),
                Wait::Source => tokio::select! {
                    ready = socket.readable() => ready?.clear_ready(),
                    () = closing.changed.notified() => {}
                },
            },
            Err(error) => return Err(error.into()),
        }
    }
}
