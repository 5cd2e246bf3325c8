//! Work in threads of its own: whatever may wait for a file system of the host's, which may never answer.
//! PID 1 has one thread for everything else.

use std::io;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

/// Threads at a time.
const MOST_THREADS: usize = 64;

static THREADS: Semaphore = Semaphore::const_new(MOST_THREADS);

/// Does `work`, which may block, in a thread of its own that goes on if nobody waits any more. There are
/// not more than [`MOST_THREADS`] of them.
pub async fn alongside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let permit = THREADS.acquire().await.map_err(io::Error::other)?;
    let (done, result) = oneshot::channel();
    std::thread::Builder::new().spawn(move || {
        drop(done.send(work()));
        drop(permit);
    })?;
    result.await.map_err(io::Error::other)
}

/// The result of `work`, and `TimedOut` if it takes longer than `limit`.
pub async fn within<T>(
    limit: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => {
            let text = format!("the file system did not answer within {} s", limit.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_never_ends_is_waited_for_no_longer_than_its_limit() {
        let (end, never) = std::sync::mpsc::channel::<()>();
        let stuck = within(Duration::from_millis(50), alongside(move || never.recv()));
        assert_eq!(stuck.await.expect_err("late").kind(), io::ErrorKind::TimedOut);
        assert_eq!(alongside(|| 7).await.expect("a thread"), 7);
        drop(end);
    }
}
