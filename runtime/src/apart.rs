//! Work in a thread of its own.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::{Semaphore, oneshot};

/// Does `work` in a thread that ends with it: the namespaces and the working folder that it changes are
/// its own, and what it starts keeps them.
pub(crate) fn apart<T: Send, E: From<Errno> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|_| Err(Errno::EIO.into())))
}

/// Threads at a time whose work may wait for a file system that never answers.
const MOST_THREADS: usize = 64;

static THREADS: Semaphore = Semaphore::const_new(MOST_THREADS);

/// Does `work`, which may block, in a thread of its own that goes on if nobody waits any more. There are
/// not more than [`MOST_THREADS`] of them.
pub(crate) async fn alongside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let permit = THREADS.acquire().await.map_err(io::Error::other)?;
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().spawn(move || {
        // Nobody waits any more: what was made is taken down here, where that may block too.
        drop(done.send(work()));
        drop(permit);
    })?;
    result.await.map_err(io::Error::other)
}

/// Like [`alongside`], and `TimedOut` if the work takes longer than `limit`.
pub(crate) async fn alongside_within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match tokio::time::timeout(limit, alongside(work)).await {
        Ok(done) => done,
        Err(_) => {
            let text = format!("the file system did not answer within {} s", limit.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
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
        let stuck = alongside_within(Duration::from_millis(50), move || never.recv());
        assert_eq!(stuck.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(alongside(|| 7).await.unwrap(), 7);
        drop(end);
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
