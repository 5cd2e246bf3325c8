//! Waits for every child, as PID 1 must, and hands the exits to those who asked.
//!
//! A process can exit before its helper has told its number. So while a helper is at work
//! ([`Reaper::hold`]) the exits of unknown processes are kept; otherwise they are orphans of
//! containers and forgotten.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{WaitOptions, wait};
use slog::{Logger, error};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::init::calls;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell says it: 128 + signal for one that was killed.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at: i64,
}

#[derive(Default)]
struct Books {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    early: HashMap<i32, Exit>,
    holds: usize,
}

/// The one who waits.
#[derive(Default)]
pub struct Reaper {
    books: Mutex<Books>,
}

/// While it lives, exits of unknown processes are kept.
pub struct Hold(Arc<Reaper>);

impl Reaper {
    /// Starts to wait. From here on nothing else may call wait.
    pub fn start(log: &Logger) -> io::Result<Arc<Self>> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags)?;
        let readiness = calls::watch(signals.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        let reaper = Arc::new(Self::default());
        let (log, worker) = (log.clone(), Arc::clone(&reaper));
        tokio::spawn(async move {
            if let Err(error) = worker.work(signals, readiness).await {
                error!(log, "reaper: ends"; "error" => %error);
            }
        });
        Ok(reaper)
    }

    async fn work(&self, signals: SignalFd, readiness: AsyncFd<OwnedFd>) -> io::Result<()> {
        loop {
            let mut ready = readiness.readable().await?;
            while let Ok(Some(_)) = signals.read_signal() {}
            ready.clear_ready();
            self.collect();
        }
    }

    /// Collects every child that has ended.
    fn collect(&self) {
        // nix's wait loses exits by real-time signals; rustix gives the number as it is.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, Some(signal)) => 128 + signal,
                (None, None) => continue,
            };
            let exit = Exit { status: u32::try_from(status).unwrap_or(255), at: now() };
            let pid = pid.as_raw_nonzero().get();
            let mut books = self.books();
            if let Some(waiter) = books.watched.remove(&pid) {
                // A waiter that has gone needs no answer.
                let _ = waiter.send(exit);
            } else if books.holds > 0 {
                books.early.insert(pid, exit);
            }
        }
    }

    /// Keeps exits of unknown processes until dropped.
    pub fn hold(self: &Arc<Self>) -> Hold {
        self.books().holds += 1;
        Hold(Arc::clone(self))
    }

    /// The exit of `pid`, a child; call it while the hold of its making still lives.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut books = self.books();
        match books.early.remove(&pid) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                books.watched.insert(pid, sender);
            }
        }
        receiver
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut books = self.0.books();
        books.holds -= 1;
        if books.holds == 0 {
            books.early.clear();
        }
    }
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_of_strangers_are_kept_only_under_a_hold() {
        let reaper = Arc::new(Reaper::default());
        let exit = Exit { status: 7, at: 1 };
        let hold = reaper.hold();
        reaper.books().early.insert(10, exit);
        reaper.books().early.insert(11, exit);
        assert_eq!(reaper.watch(10).try_recv(), Ok(exit));
        drop(hold);
        assert!(reaper.books().early.is_empty());
        assert!(reaper.watch(11).try_recv().is_err());
    }
}
