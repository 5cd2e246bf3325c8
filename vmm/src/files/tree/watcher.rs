//! Whether two descriptors are of one inode of the host's kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use super::credentials::permitted;
use super::identity::is_exact;
use super::system::{check, descriptor_name};

/// Comparisons by one inotify instance: each leaves events in its queue, which nobody reads.
const MOST_USES: u32 = 4096;

/// An inotify instance, while it is in use: a user may have few, and all servers are one user's.
///
/// A watch belongs to an inode in memory, and to watch it twice gives the same number. The watches
/// last for one comparison. The instance lasts for many, as to close it takes the kernel milliseconds.
#[derive(Debug, Default)]
pub struct Watcher(Mutex<Option<(OwnedFd, u32)>>);

impl Watcher {
    /// Whether two descriptors are of one inode; both have the same device and inode number.
    pub fn same_file(&self, one: &File, other: &File) -> io::Result<bool> {
        Ok(is_exact(one)? || self.same_inode(one, other)?)
    }

    /// Whether two descriptors are of one inode, whatever their numbers say.
    pub fn same_inode(&self, one: &File, other: &File) -> io::Result<bool> {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let mut instance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (watcher, uses) = match instance.take().filter(|(_, uses)| *uses < MOST_USES) {
            Some(instance) => instance,
            None => {
                // SAFETY: plain flags.
                let watcher = check(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
                // SAFETY: just opened, so nobody else owns it.
                (unsafe { OwnedFd::from_raw_fd(watcher) }, 0)
            }
        };
        let first = watch(&watcher, one)?;
        let second = watch(&watcher, other)?;
        for number in [first, second] {
            // SAFETY: plain numbers. The second call finds no watch if both are the same.
            unsafe { libc::inotify_rm_watch(watcher.as_raw_fd(), number) };
        }
        *instance = Some((watcher, uses + 1));
        Ok(first == second)
    }

    /// Whether an instance is open.
    pub fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Closes the instance.
    pub fn close(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn watch(watcher: &OwnedFd, file: &File) -> io::Result<libc::c_int> {
    let name = descriptor_name(file);
    permitted(|| {
        // SAFETY: the name is terminated; the link followed is the one in /proc.
        check(unsafe {
            libc::inotify_add_watch(watcher.as_raw_fd(), name.as_ptr(), libc::IN_DELETE_SELF)
        })
    })
}
