//! Opening files for their content.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::api::filesystem::OpenOptions;

use super::Tree;
use super::handle::Handle;
use super::node::Node;
use super::system::Status;

/// What of the guest's open flags is passed on always.
///
/// Not `O_APPEND`: the guest's kernel writes cached pages through any open file, to where they belong;
/// appending is asked for by each write. Not `O_DIRECT`: the guest's cache is passed by anyway, and
/// message buffers are not aligned.
const PASSED: libc::c_int = libc::O_ACCMODE
    | libc::O_TRUNC
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK;

/// Times of change are as coarse as the host's timer interrupt, 10 ms at most.
const FINE: Duration = Duration::from_millis(20);

/// On file systems that keep seconds only, FAT's two seconds at most.
const COARSE: Duration = Duration::from_secs(2);

/// Returns the flags to open a file with, for a guest that gives `flags`.
pub fn open_flags(flags: u32) -> libc::c_int {
    flags.cast_signed() & PASSED
}

/// The time of change of the content that the guest's kernel may have in its cache: nanoseconds since
/// 1970, 0 for none that it may keep.
#[derive(Debug, Default)]
pub struct Cached(AtomicI64);

impl Cached {
    /// Notes that the guest opens the file of that status. Returns whether its kernel may keep what it
    /// has in its cache.
    ///
    /// The guest's kernel itself compares size and time of modification, which a program can set back;
    /// nobody can set the time of change.
    fn keep(&self, status: &Status, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = status.change_time();
        let changed = seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds.into());
        // Within one tick of the host's clock a second change would not show.
        let tick = if nanoseconds == 0 { COARSE } else { FINE };
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let age = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX).saturating_sub(changed);
        let settled = u128::try_from(age).is_ok_and(|age| age >= tick.as_nanos());
        let before = self.0.swap(if settled { changed } else { 0 }, Ordering::Relaxed);
        settled && before == changed
    }
}

impl Tree {
    /// Opens a node for its content, as the guest asks for by `flags`; the handle and how the guest's
    /// kernel is to treat it.
    pub(super) fn open_content(
        &self,
        node: &Node,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<(Handle, OpenOptions)> {
        let traits = self.mounts.of(node.key.mount);
        let mut passed = open_flags(flags);
        if traits.may_wait {
            // A read that waits for an event would hold up a thread.
            passed |= libc::O_NONBLOCK;
        }
        let append = flags.cast_signed() & libc::O_APPEND;
        // Append-only files open for appending only; not every file lets its time of access be.
        let mut tries = vec![passed, passed | append];
        if passed & libc::O_NOATIME != 0 {
            tries.extend([passed & !libc::O_NOATIME, passed & !libc::O_NOATIME | append]);
        }
        tries.dedup();
        let mut refused = io::Error::from_raw_os_error(libc::EPERM);
        for tried in tries {
            match self.open_node(node, tried, kill_privileges) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => refused = error,
                opened => {
                    let file = opened?;
                    let text = self.mounts.text_for(&file, node.key.mount)?;
                    let handle = self.handles.of(file, tried).with_text(text);
                    let options = if traits.made_on_reading || handle.append_only() {
                        OpenOptions::DIRECT_IO
                    } else {
                        OpenOptions::empty()
                    };
                    return Ok((handle, options));
                }
            }
        }
        Err(refused)
    }

    pub(super) fn open_file(
        &self,
        number: u64,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<(u64, OpenOptions)> {
        let node = self.node(number)?;
        let (handle, mut options) = self.open_content(&node, flags, kill_privileges)?;
        // Cached content stays good as long as the times and the size do; else each start of a program
        // would fetch its libraries again.
        if options.is_empty() && node.cached.keep(&Status::of(&handle.file)?, SystemTime::now()) {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((self.handles.insert(handle), options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_kept_while_the_time_of_change_stays() {
        let file = tempfile::tempfile().unwrap();
        let cached = Cached::default();
        let now = SystemTime::now();
        let later = |milliseconds| now + Duration::from_millis(milliseconds);
        let status = || Status::of(&file).unwrap();
        // Too new to tell from what may still come.
        assert!(!cached.keep(&status(), now));
        assert!(!cached.keep(&status(), now));
        assert!(!cached.keep(&status(), later(1000)));
        assert!(cached.keep(&status(), later(1000)));
        assert!(cached.keep(&status(), later(2000)));
        std::thread::sleep(FINE);
        file.set_modified(now).unwrap();
        assert!(!cached.keep(&status(), later(3000)));
        assert!(cached.keep(&status(), later(3000)));
        // A clock that was set back, or another machine's.
        assert!(!cached.keep(&status(), now - Duration::from_secs(100)));
    }
}
