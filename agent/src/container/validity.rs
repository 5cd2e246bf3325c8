//! How long the guest's kernel may go on believing what it was told of the host's files.
//!
//! A process is to see what the host had written when it was asked for, under names too that others have
//! just looked at. Nothing takes back what the kernel believes, but it believes it for milliseconds only.

use std::io;
use std::thread;
use std::time::Duration;

use husk_agent_protocols::SHARE_PATH;
use nix::time::{ClockId, clock_getres, clock_gettime};
use serde::{Deserialize, Serialize};

/// The file server needs this long only if it waits for a file system of the host's.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// No validity is longer.
const LONGEST: Duration = Duration::from_secs(1);

/// How often the kernel's coarse clock is looked at for an end that has come by the fine one.
const LOOKS: usize = 100;

/// The attribute of the share by which its server says how long that is; empty if it does not say.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Validity(String);

/// The end of what the kernel believed at some time, by its coarse clock.
#[derive(Debug, Clone, Copy)]
pub struct End(Duration);

impl Validity {
    /// A validity that the share's attribute `name` tells.
    pub fn new(name: String) -> Self {
        Self(name)
    }

    /// Asks for the end of what the kernel believes now. The share may let the caller wait.
    pub fn end(&self) -> io::Result<End> {
        if self.0.is_empty() {
            return Ok(End(Duration::ZERO));
        }
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(SHARE_PATH, self.0.as_str(), &mut value)?;
        if length != value.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let tick = Duration::from(clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?);
        Ok(End::after(now, i64::from_le_bytes(value), tick))
    }

    /// Waits until nothing is believed any more that the kernel was told before. A server that does not
    /// answer is not waited for.
    pub async fn pass(&self) {
        if self.0.is_empty() {
            return;
        }
        let asked = self.clone();
        let passed = tokio::task::spawn_blocking(move || asked.end().map(End::wait));
        let _ = tokio::time::timeout(ANSWER_LIMIT, passed).await;
    }
}

impl End {
    /// The end of a validity that has `left` nanoseconds at `now`, for a kernel that counts in ticks: up to
    /// one more passes before the validity is over, and one is for the answer's way.
    fn after(now: Duration, left: i64, tick: Duration) -> Self {
        let distance = Duration::from_nanos(left.unsigned_abs()).min(LONGEST);
        let end = if left < 0 { now.saturating_sub(distance) } else { now + distance };
        Self(end + 2 * tick)
    }

    /// Waits until then. The coarse clock goes with the kernel's ticks, which may be late.
    pub fn wait(self) {
        for _ in 0..LOOKS {
            let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from);
            let left = self.0.saturating_sub(now.unwrap_or(self.0));
            if left.is_zero() {
                return;
            }
            thread::sleep(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_validity_ends_two_ticks_late_by_the_coarse_clock() {
        let milliseconds = Duration::from_millis;
        let end = |left| End::after(milliseconds(5000), left, milliseconds(4)).0;
        assert_eq!(end(10_000_000), milliseconds(5018));
        assert_eq!(end(0), milliseconds(5008));
        assert_eq!(end(-6_000_000), milliseconds(5002));
        assert_eq!(end(-500_000_000), milliseconds(4508));
        assert_eq!(end(i64::MIN), milliseconds(4008));
        assert_eq!(end(i64::MAX), milliseconds(6008));
        let coarse = || Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).unwrap());
        let end = End(coarse() + milliseconds(15));
        end.wait();
        assert!(coarse() >= end.0);
        assert!(Validity::default().end().unwrap().0.is_zero());
    }
}
