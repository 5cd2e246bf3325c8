//! One process of a container: running → exited, never back.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::{oneshot, watch};

use crate::init::calls;
use crate::init::reaper::Exit;
use crate::process::stdio::Relays;
use crate::process::terminal::Terminal;

/// What is known of a process that has exited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// Status and time.
    pub exit: Exit,
    /// Bytes it had written to its standard output by then.
    pub output: u64,
    /// The same for standard error.
    pub error: u64,
    /// How often the kernel's out-of-memory killer had struck in its container.
    pub out_of_memory: u64,
}

/// Why a signal could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// The process has exited.
    #[error("process already finished")]
    Exited,
    /// There is no such signal.
    #[error("no signal {0}")]
    Unknown(u32),
    /// The kernel refuses.
    #[error("signal: {0}")]
    Kernel(#[from] io::Error),
}

/// One process, from its making until it is deleted.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    // Numbers are used again, descriptors are not. None if it had exited before we could ask.
    handle: Option<OwnedFd>,
    relays: Mutex<Option<Relays>>,
    exited: watch::Sender<Option<Exited>>,
}

impl Process {
    /// Follows the child `pid` with its `relays`. `exit` comes from the reaper; `at_exit` runs
    /// first of all then and says how often the out-of-memory killer had struck.
    pub fn follow(
        pid: i32,
        relays: Relays,
        exit: oneshot::Receiver<Exit>,
        at_exit: impl FnOnce() -> u64 + Send + 'static,
    ) -> Arc<Self> {
        let handle = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let relays = Mutex::new(Some(relays));
        let process = Arc::new(Self { pid, handle, relays, exited: watch::Sender::new(None) });
        let follower = Arc::clone(&process);
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let Ok(exit) = exit.await else { return };
            let out_of_memory = at_exit();
            let drained =
                follower.relays().as_ref().and_then(Relays::terminal).map(Terminal::drained);
            if let Some(drained) = drained {
                Terminal::settle(drained).await;
            }
            let (output, error) = follower.relays().as_ref().map_or((0, 0), Relays::produced);
            follower.exited.send_replace(Some(Exited { exit, output, error, out_of_memory }));
        });
        process
    }

    /// The process id as the guest sees it.
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// What is known of its exit, if it has exited.
    pub fn exited(&self) -> Option<Exited> {
        *self.exited.borrow()
    }

    /// Waits for the exit; any number of callers may, also after it.
    pub async fn wait(&self) -> Exited {
        let mut exited = self.exited.subscribe();
        loop {
            if let Some(exited) = *exited.borrow_and_update() {
                return exited;
            }
            if exited.changed().await.is_err() {
                // The sender is a part of self.
                unreachable!("the process is borrowed");
            }
        }
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: u32) -> Result<(), SignalError> {
        let handle = self.handle.as_ref().ok_or(SignalError::Exited)?;
        let number = i32::try_from(signal).map_err(|_| SignalError::Unknown(signal))?;
        calls::signal(handle.as_fd(), number).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => SignalError::Exited,
            Some(libc::EINVAL) => SignalError::Unknown(signal),
            _ => SignalError::Kernel(error),
        })
    }

    /// Closes standard input once what has come is delivered.
    pub fn close_input(&self) {
        if let Some(relays) = self.relays().as_ref() {
            relays.close_input();
        }
    }

    /// Sets the terminal's size; false if there is no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<bool> {
        match self.relays().as_ref().and_then(Relays::terminal) {
            Some(terminal) => terminal.resize(rows, columns).map(|()| true),
            None => Ok(false),
        }
    }

    /// Closes all streams.
    pub fn hang_up(&self) {
        self.relays().take();
    }

    fn relays(&self) -> MutexGuard<'_, Option<Relays>> {
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
