//! How much may pass: buckets of tokens that fill up steadily.
//!
//! A frame passes if each bucket has a token; then it takes as many as it costs, and the bucket may
//! be in debt. So a frame that is larger than a bucket passes too, and what passes over time is what
//! was set, to the byte.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use husk_control::{RateLimit, TokenBucket};
use vmm_sys_util::timerfd::TimerFd;

/// Who waits, waits at least that long, so that a small debt does not mean a timer per frame.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// Why there can be no limit.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// Nothing could ever pass.
    #[error("a bucket of tokens must have a size and a refill time of 1 or more")]
    Empty,
    /// No timer.
    #[error("the timer of a rate limit")]
    Timer(#[from] vmm_sys_util::errno::Error),
}

/// A limit in one direction, with the timer of who waits for it.
pub struct Limiter {
    buckets: Buckets,
    timer: TimerFd,
}

/// The buckets of a limit.
struct Buckets {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

/// One bucket.
struct Bucket {
    size: u64,
    /// Nanoseconds from empty to full.
    refill: u64,
    /// Tokens there are; a debt if negative.
    balance: i128,
    /// Up to when tokens have been added.
    since: Instant,
}

impl Limiter {
    /// The limit asked for.
    pub fn new(limit: &RateLimit) -> Result<Self, LimitError> {
        let buckets = Buckets::new(limit, Instant::now())?;
        Ok(Self { buckets, timer: TimerFd::new()? })
    }

    /// Whether a frame may pass now. If not, the timer will say when.
    pub fn is_open(&mut self) -> bool {
        match self.buckets.wait(Instant::now()) {
            None => true,
            Some(wait) => {
                // It fails for no time that is not zero, and this is not.
                let _ = self.timer.reset(wait, None);
                false
            }
        }
    }

    /// A frame of that many bytes has passed.
    pub fn charge(&mut self, bytes: usize) {
        self.buckets.charge(bytes);
    }
}

impl AsRawFd for Limiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

impl Buckets {
    fn new(limit: &RateLimit, now: Instant) -> Result<Self, LimitError> {
        let bucket =
            |set: &Option<TokenBucket>| set.as_ref().map(|set| Bucket::new(set, now)).transpose();
        Ok(Self { bytes: bucket(&limit.bytes)?, packets: bucket(&limit.packets)? })
    }

    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let buckets = self.bytes.iter_mut().chain(&mut self.packets);
        buckets.filter_map(|bucket| bucket.wait(now)).max()
    }

    fn charge(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            // A frame has at most 64 KiB and some.
            bucket.balance -= i128::try_from(bytes).unwrap_or(i128::from(u32::MAX));
        }
        if let Some(bucket) = &mut self.packets {
            bucket.balance -= 1;
        }
    }
}

impl Bucket {
    fn new(set: &TokenBucket, now: Instant) -> Result<Self, LimitError> {
        if set.size == 0 || set.refill_ms == 0 {
            return Err(LimitError::Empty);
        }
        Ok(Self {
            size: set.size,
            refill: set.refill_ms.saturating_mul(1_000_000),
            balance: i128::from(set.size) + i128::from(set.burst),
            since: now,
        })
    }

    /// How long until there is a token; `None`: there is one.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        if self.balance > 0 {
            return None;
        }
        // A debt is of one frame; the product has room in 128 bits.
        let missing = (1 - self.balance).unsigned_abs();
        let nanoseconds =
            missing.saturating_mul(u128::from(self.refill)).div_ceil(self.size.into());
        let wait = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        // Half a refill at most: longer, and the bucket would run over.
        let least = LEAST_WAIT.min(Duration::from_nanos(self.refill / 2));
        Some(wait.max(least))
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since).as_nanos();
        // 2^64 ns are 584 years.
        let gained = elapsed.saturating_mul(self.size.into()) / u128::from(self.refill);
        if gained == 0 {
            return;
        }
        let size = i128::from(self.size);
        if self.balance < size {
            let filled = self.balance.saturating_add(i128::try_from(gained).unwrap_or(i128::MAX));
            self.balance = filled.min(size);
        }
        // Only the time that these tokens took: the rest counts for the next one.
        let used = gained.saturating_mul(self.refill.into()) / u128::from(self.size);
        self.since += Duration::from_nanos(u64::try_from(used.min(elapsed)).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, burst: u64, refill_ms: u64, now: Instant) -> Bucket {
        Bucket::new(&TokenBucket { size, burst, refill_ms }, now).unwrap()
    }

    #[test]
    fn the_burst_is_there_once() {
        let start = Instant::now();
        let mut bucket = bucket(1000, 500, 1000, start);
        bucket.balance -= 1500;
        assert!(bucket.wait(start).is_some());
        assert!(bucket.wait(start + Duration::from_secs(3600)).is_none());
        assert_eq!(bucket.balance, 1000);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
        let start = Instant::now();
        let mut bucket = bucket(1000, 0, 1000, start);
        assert!(bucket.wait(start).is_none());
        bucket.balance -= 65_000;
        let wait = bucket.wait(start).unwrap();
        assert_eq!(wait, Duration::from_millis(64_001));
        assert!(bucket.wait(start + wait - Duration::from_millis(1)).is_some());
        assert!(bucket.wait(start + wait).is_none());
    }

    #[test]
    fn both_buckets_must_have_a_token() {
        let start = Instant::now();
        let set = |size| Some(TokenBucket { size, burst: 0, refill_ms: 1000 });
        let limit = RateLimit { bytes: set(1_000_000), packets: set(2) };
        let mut buckets = Buckets::new(&limit, start).unwrap();
        for _ in 0..2 {
            assert!(buckets.wait(start).is_none());
            buckets.charge(100);
        }
        assert_eq!(buckets.wait(start), Some(Duration::from_millis(500)));
        let limit = RateLimit { bytes: set(100), packets: set(1000) };
        let mut buckets = Buckets::new(&limit, start).unwrap();
        buckets.charge(200);
        assert_eq!(buckets.wait(start), Some(Duration::from_millis(1010)));
        assert!(Buckets::new(&RateLimit::default(), start).unwrap().wait(start).is_none());
    }

    #[test]
    fn a_limit_that_lets_nothing_pass_is_refused() {
        for (size, refill_ms) in [(0, 1), (1, 0)] {
            let set = Some(TokenBucket { size, burst: 9, refill_ms });
            let limit = RateLimit { bytes: None, packets: set };
            assert!(matches!(Limiter::new(&limit), Err(LimitError::Empty)));
        }
    }

    #[test]
    fn the_timer_says_when() {
        let set = Some(TokenBucket { size: 1, burst: 0, refill_ms: 10 });
        let mut limiter = Limiter::new(&RateLimit { bytes: None, packets: set }).unwrap();
        assert!(limiter.is_open());
        limiter.charge(1);
        assert!(!limiter.is_open());
        limiter.timer.wait().unwrap();
        assert!(limiter.is_open());
    }

    proptest! {
        /// Over time there passes what was set: not more, and, as long as somebody always wants to
        /// send and comes when told, not less either.
        #[test]
        fn the_rate_is_kept(
            size in 1_u64..1 << 40,
            burst in 0_u64..1 << 40,
            refill_ms in 1_u64..100_000,
            frames in prop::collection::vec(1_u64..70_000, 1..300),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = bucket(size, burst, refill_ms, start);
            let mut passed = 0_u128;
            for frame in frames {
                if let Some(wait) = bucket.wait(now) {
                    now += wait;
                    prop_assert!(bucket.wait(now).is_none(), "told too early");
                }
                let elapsed = (now - start).as_nanos();
                let earned = elapsed * u128::from(size) / (u128::from(refill_ms) * 1_000_000);
                prop_assert!(passed <= u128::from(size) + u128::from(burst) + earned);
                bucket.balance -= i128::from(frame);
                passed += u128::from(frame);
            }
            prop_assert!(bucket.balance <= i128::from(size) + i128::from(burst));
        }

        /// In no stretch of time does more pass than the bucket holds, what was gained meanwhile, and
        /// the one frame that may overdraw it; and who waits as long as told always gets through.
        #[test]
        fn no_stretch_of_time_has_more(
            size in 1_u64..1 << 30,
            burst in 0_u64..1 << 20,
            refill_ms in 1_u64..10_000,
            steps in prop::collection::vec((1_u64..70_000, 0_u64..20_000_000), 1..60),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = bucket(size, burst, refill_ms, start);
            let mut passed: Vec<(Duration, u64)> = Vec::new();
            for (frame, pause) in steps {
                now += Duration::from_nanos(pause);
                if let Some(wait) = bucket.wait(now) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                    prop_assert!(bucket.wait(now).is_none(), "told too early");
                }
                bucket.balance -= i128::from(frame);
                passed.push((now - start, frame));
                let mut sum = 0;
                for (since, frame) in passed.iter().rev() {
                    sum += u128::from(*frame);
                    let elapsed = (now - start - *since).as_nanos();
                    let gained = elapsed * u128::from(size) / (u128::from(refill_ms) * 1_000_000);
                    let last = u128::from(passed.last().map_or(0, |(_, frame)| *frame));
                    // Fractions of a token, at both ends.
                    let most = u128::from(size) + u128::from(burst) + gained + last + 2;
                    prop_assert!(sum <= most, "{sum} of {most} in {elapsed} ns");
                }
            }
        }

        #[test]
        fn nothing_overflows(
            size in 1_u64..=u64::MAX,
            burst in any::<u64>(),
            refill_ms in 1_u64..=u64::MAX,
            steps in prop::collection::vec((any::<u32>(), 0_u64..1 << 50), 1..50),
        ) {
            let mut now = Instant::now();
            let mut bucket = bucket(size, burst, refill_ms, now);
            for (cost, step) in steps {
                now += Duration::from_nanos(step);
                bucket.wait(now);
                bucket.balance -= i128::from(cost);
            }
        }
    }
}
