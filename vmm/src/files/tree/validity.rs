//! How long the guest's kernel may believe what it was told of names and attributes.
//!
//! No virtio-fs server can take back what it has said. So the time is short, and the guest's agent asks by
//! [`VALIDITY_ATTRIBUTE`] how long the last of it lasts before a process begins that is to see what the host
//! has written by then.
//!
//! Of a mount that the guest has entered since the agent asked last, nothing may be believed. So what is
//! looked up while a container is created does not hold up its start.

use std::ffi::CStr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use husk_control::VALIDITY_ATTRIBUTE;

/// The time for names and attributes of files that the host can change at any time. Long enough that a
/// burst of calls on one file asks once; so short that the agent rarely has to wait.
const VALIDITY: Duration = Duration::from_millis(10);

/// The time for the shared folder's own tree, which only the shim changes: before a guest hears of it.
pub const OWN_VALIDITY: Duration = Duration::from_secs(1);

/// When the last of what the guest may believe ends.
#[derive(Debug)]
pub struct Validity {
    began: Instant,
    /// Nanoseconds since `began`.
    ends: AtomicI64,
    /// How often the agent has asked.
    asked: AtomicU64,
}

impl Validity {
    /// Nothing has been said yet.
    pub fn new() -> Self {
        Self { began: Instant::now(), ends: AtomicI64::new(0), asked: AtomicU64::new(0) }
    }

    /// Returns how often the agent has asked.
    pub fn times_asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Notes that the guest is told what was just looked at, on a mount that it entered when the agent had
    /// asked `entered` times, and returns how long it may believe that.
    pub fn begin(&self, entered: u64) -> Duration {
        if self.times_asked() <= entered {
            return Duration::ZERO;
        }
        self.ends.fetch_max(nanoseconds(self.began.elapsed() + VALIDITY), Ordering::Relaxed);
        VALIDITY
    }

    /// Returns the value of the attribute `name` of the shared folder, if that asks for the validity:
    /// nanoseconds until its end, negative after it.
    pub fn asked(&self, name: &CStr) -> Option<[u8; 8]> {
        let asked = name.to_bytes() == VALIDITY_ATTRIBUTE.as_bytes();
        asked.then(|| {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.left(self.began.elapsed()).to_le_bytes()
        })
    }

    fn left(&self, now: Duration) -> i64 {
        self.ends.load(Ordering::Relaxed).saturating_sub(nanoseconds(now))
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_hears_when_the_last_of_it_ends() {
        let validity = Validity::new();
        let left = |validity: &Validity| {
            let name = std::ffi::CString::new(VALIDITY_ATTRIBUTE).unwrap();
            i64::from_le_bytes(validity.asked(&name).unwrap())
        };
        assert_eq!(validity.begin(0), Duration::ZERO);
        assert!(left(&validity) <= 0);
        assert_eq!(validity.begin(1), Duration::ZERO);
        let most = i64::try_from(validity.begin(0).as_nanos()).unwrap();
        assert!(most > 0);
        assert!(left(&validity) <= most);
        let before = validity.began.elapsed();
        validity.begin(0);
        let after = validity.began.elapsed();
        assert!(validity.left(before) >= most && validity.left(after) <= most);
        std::thread::sleep(VALIDITY);
        assert!(left(&validity) < 0);
        assert!(validity.asked(c"trusted.other").is_none());
    }
}
