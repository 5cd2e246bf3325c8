//! What the guest's kernel may keep of a file's content.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::system::Status;

/// Times of change are as coarse as the host's timer interrupt, 10 ms at most.
const FINE: Duration = Duration::from_millis(20);

/// On file systems that keep seconds only, FAT's two seconds at most.
const COARSE: Duration = Duration::from_secs(2);

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
    pub fn keep(&self, status: &Status, now: SystemTime) -> bool {
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
