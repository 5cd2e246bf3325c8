//! The allocator's memory: there is a shim for each sandbox, and most of the time it does nothing.

use std::time::Duration;

/// How long after a start its buffers, specs and threads are surely gone.
const SETTLED: Duration = Duration::from_secs(1);

/// Has all threads allocate from one heap. Each would get one of its own otherwise, and keep what it touched of
/// it; but all that they do is to wait for the kernel. To be called before there is a second thread.
pub fn share_one_heap() {
    // SAFETY: the call takes two numbers. A setting that is refused changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives the memory back that a start has left free, once that is over.
pub fn give_back_later() {
    tokio::spawn(async {
        tokio::time::sleep(SETTLED).await;
        // SAFETY: the call releases pages that hold no allocation, under the allocator's own lock.
        unsafe { libc::malloc_trim(0) };
    });
}
