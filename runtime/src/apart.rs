//! Work in a thread of its own.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

/// Does `work` in a thread that ends with it: the namespaces and the working folder that it changes are
/// its own, and what it starts keeps them.
pub(crate) fn apart<T: Send, E: From<Errno> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|_| Err(Errno::EIO.into())))
}

/// Threads of each purpose at a time whose work may wait for a file system that never answers.
const MOST_THREADS: usize = 64;

/// How long what is opened, read or laid out may take.
pub const OPEN: Duration = Duration::from_secs(30);

/// How long what is taken down is waited for: an overlay writes its files back when it is unmounted.
pub(crate) const CLEAR: Duration = Duration::from_secs(30);

/// The purpose of work apart. Each has threads of its own, so that what cannot be opened or written keeps
/// nothing from being taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Opening, reading and mounting.
    Open,
    /// Writing output.
    Write,
    /// Unmounting and closing.
    Clear,
}

static OPENING: Semaphore = Semaphore::const_new(MOST_THREADS);
static WRITING: Semaphore = Semaphore::const_new(MOST_THREADS);
static CLEARING: Semaphore = Semaphore::const_new(MOST_THREADS);

impl Purpose {
    const fn threads(self) -> &'static Semaphore {
        match self {
            Self::Open => &OPENING,
            Self::Write => &WRITING,
            Self::Clear => &CLEARING,
        }
    }
}

/// Does `work`, which may block, in a thread of its own that goes on if nobody waits any more. There are
/// not more than [`MOST_THREADS`] of them for a purpose.
pub(crate) async fn alongside<T: Send + 'static>(
    purpose: Purpose,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let permit = purpose.threads().acquire().await.map_err(io::Error::other)?;
    let (done, result) = oneshot::channel();
    spawn(permit, move || {
        // Nobody waits any more: what was made is taken down here, where that may block too.
        drop(done.send(work()));
    })?;
    result.await.map_err(io::Error::other)
}

fn spawn(permit: SemaphorePermit<'static>, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().spawn(move || {
        work();
        drop(permit);
    });
    thread.map(drop)
}

/// Like [`alongside`], and `TimedOut` if the work takes longer than `limit`.
pub(crate) async fn alongside_within<T: Send + 'static>(
    purpose: Purpose,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match tokio::time::timeout(limit, alongside(purpose, work)).await {
        Ok(done) => done,
        Err(_) => Err(no_answer(limit)),
    }
}

/// The error of a file system that has not answered for `time`.
pub(crate) fn no_answer(time: Duration) -> io::Error {
    let text = format!("the file system did not answer within {} s", time.as_secs());
    io::Error::new(ErrorKind::TimedOut, text)
}

/// Does `work`, which opens or reads files, in a thread of its own; `TimedOut` after [`OPEN`].
///
/// # Errors
///
/// That of the work, or that it takes too long.
pub async fn opened<T: Send + 'static, E: From<io::Error> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    alongside_within(Purpose::Open, OPEN, work).await?
}

/// A value whose end may block: a file, or a mount. Dropping drops the value in a thread of its own.
#[derive(Debug)]
pub(crate) struct Aside<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Aside<T> {
    /// Holds `value`.
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// The value.
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }

    /// Drops the value and waits for that, but not longer than `limit`.
    pub(crate) async fn end(mut self, limit: Duration) -> io::Result<()> {
        let Some(value) = self.0.take() else { return Ok(()) };
        // In the closure before anything is waited for: if this is given up, the thread has it.
        alongside_within(Purpose::Clear, limit, move || drop(value)).await
    }
}

impl<T: Send + 'static> Drop for Aside<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        let threads = Purpose::Clear.threads();
        match (threads.try_acquire(), Handle::try_current()) {
            (Ok(permit), _) => {
                // Without a thread the value is dropped with the closure, here.
                let _ = spawn(permit, move || drop(value));
            }
            (Err(_), Ok(runtime)) => {
                runtime.spawn(alongside(Purpose::Clear, move || drop(value)));
            }
            (Err(_), Err(_)) => drop(value),
        }
    }
}

/// The mount namespace that the shim was started in, which is containerd's; `None` for the calling
/// thread's own.
///
/// The shim's namespace is a copy that gets the later mounts of those that are shared there. On a host
/// whose `/` is private it gets none.
#[derive(Debug, Clone, Default)]
pub struct HostMounts(pub Option<Arc<File>>);

impl HostMounts {
    /// Does `work` in a thread in that namespace, with its root as root and working folder.
    pub(crate) fn within<T: Send, E: From<Errno> + Send>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, E> {
        apart(|| {
            // The root and the working folder change with the namespace, for this thread only.
            unshare(CloneFlags::CLONE_FS)?;
            if let Some(namespace) = &self.0 {
                setns(&**namespace, CloneFlags::CLONE_NEWNS)?;
            }
            work()
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_never_ends_is_waited_for_no_longer_than_its_limit() {
        let (end, never) = std::sync::mpsc::channel::<()>();
        let limit = Duration::from_millis(50);
        let stuck = alongside_within(Purpose::Open, limit, move || never.recv());
        assert_eq!(stuck.await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(alongside(Purpose::Open, || 7).await.unwrap(), 7);
        drop(end);
    }

    #[tokio::test]
    async fn what_is_dropped_aside_holds_nobody_up() {
        struct Stuck(std::sync::mpsc::Receiver<()>, tokio::sync::mpsc::UnboundedSender<()>);
        impl Drop for Stuck {
            fn drop(&mut self) {
                let _ = self.0.recv();
                let _ = self.1.send(());
            }
        }
        let (end, never) = std::sync::mpsc::channel();
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let aside = Aside::new(Stuck(never, told));
        assert!(aside.get().is_some());
        drop(aside);
        Aside::new(7).end(CLEAR).await.unwrap();
        assert!(heard.try_recv().is_err(), "it waits");
        drop(end);
        heard.recv().await.unwrap();
    }

    /// Gives the calling thread a mount namespace of its own; says so if that is forbidden.
    pub(crate) fn leave_mounts() -> bool {
        let left = husk_stage::leave_mounts();
        if left.is_err() {
            husk_skip::skipped("no mount namespace can be made");
        }
        left.is_ok()
    }

    /// Runs a test in a thread with a mount namespace of its own; not at all where that is forbidden.
    pub(crate) fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
        let thread = husk_skip::spawn(|| {
            if leave_mounts() {
                test();
            }
        });
        thread.join().unwrap();
    }
}
