//! The guest's clock, which follows the host's.
//!
//! The kernel tells of each step of the host's clock, and the guest's takes the same one at once. Between
//! steps the guest's clock runs at the rate to which the host's is set, as by NTP. That rate changes little by
//! little, so the two clocks are compared every [`INTERVAL`].

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use husk_agent_protocols::agent::AdjustClockRequest;
use nix::errno::Errno;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::read;
use slog::{Logger, debug, info, warn};
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::agent_client::{AgentClient, AgentError};
use crate::error::chain;
use crate::machine::{Machine, watched_fd};

/// Time from the start to the first comparison: a boot leaves the guest's clock late by a message's way.
const FIRST: Duration = Duration::from_secs(1);

/// Time between two comparisons. At 500 parts per million, the most that the kernel slews by, clocks part by
/// 30 ms in it.
const INTERVAL: Duration = Duration::from_secs(60);

/// Time to the next try after the agent did not answer.
const RETRY: Duration = Duration::from_millis(500);

/// Tries of one comparison, of which the one with the shortest way counts.
const TRIES: usize = 3;

/// Nanoseconds of difference that are left alone, or sought with one try.
const CLOSE: i64 = 1_000_000;

/// Nanoseconds of difference from which the guest's clock jumps although the host's did not. The kernel slews
/// this away before the next comparison but one.
const JUMP: i64 = 50_000_000;

/// A date that no timer here reaches, in seconds: in the year 2255.
const NEVER: i64 = 9_000_000_000;

/// Keeps the guest's clock with the host's until the machine ends.
pub(super) fn follow(machine: &Arc<Machine>, agent: &AgentClient, log: &Logger) {
    let (machine, agent, log) = (Arc::clone(machine), agent.clone(), log.clone());
    tokio::spawn(async move {
        tokio::select! {
            _ = machine.end() => {}
            never = keep(&agent, &log) => match never {},
        }
    });
}

async fn keep(agent: &AgentClient, log: &Logger) -> Infallible {
    let steps = Steps::watch().inspect_err(|error| {
        let seconds = INTERVAL.as_secs();
        warn!(log, "clock: a step of the host's is followed only after {seconds} s"; "error" => %error);
    });
    let mut pause = FIRST;
    let mut stepped = false;
    loop {
        tokio::select! {
            () = next(steps.as_ref().ok()) => stepped = true,
            () = sleep(pause) => {}
        }
        pause = match correct(agent, stepped, log).await {
            Ok(()) => {
                stepped = false;
                INTERVAL
            }
            Err(error) => {
                debug!(log, "clock: not followed"; "error" => chain(&error));
                if stepped { RETRY } else { INTERVAL }
            }
        };
    }
}

async fn next(steps: Option<&Steps>) {
    match steps {
        Some(steps) => steps.next().await,
        None => pending().await,
    }
}

/// Compares the clocks and corrects the guest's.
async fn correct(agent: &AgentClient, stepped: bool, log: &Logger) -> Result<(), AgentError> {
    let difference = compare(agent).await?;
    let (step, slew) = difference.correction(stepped);
    if step != 0 {
        info!(log, "clock: the guest's takes a step"; "microseconds" => step);
    }
    let rate = Rate::of_host();
    let request = AdjustClockRequest {
        step_microseconds: step,
        slew_microseconds: slew,
        frequency: rate.frequency,
        tick: rate.tick,
        tai_offset: rate.tai,
        ..Default::default()
    };
    agent.adjust_clock(&request).await
}

/// Time by which the host's clock is ahead of the guest's.
#[derive(Debug, Clone, Copy)]
struct Difference {
    /// Nanoseconds.
    ahead: i64,
    /// Nanoseconds by which `ahead` can be wrong: half of the time that the question took.
    error: i64,
}

impl Difference {
    /// Returns the microseconds by which the guest's clock is to jump, and by which it is to slew.
    fn correction(self, stepped: bool) -> (i64, i64) {
        let size = self.ahead.saturating_abs();
        let microseconds = self.ahead / 1000;
        if size <= self.error.max(CLOSE) {
            (0, 0)
        } else if stepped || size >= JUMP {
            (microseconds, 0)
        } else {
            (0, microseconds)
        }
    }
}

async fn compare(agent: &AgentClient) -> Result<Difference, AgentError> {
    let mut best = compare_once(agent).await?;
    for _ in 1..TRIES {
        if best.error <= CLOSE {
            break;
        }
        let other = compare_once(agent).await?;
        if other.error < best.error {
            best = other;
        }
    }
    Ok(best)
}

async fn compare_once(agent: &AgentClient) -> Result<Difference, AgentError> {
    let (before, start) = (SystemTime::now(), Instant::now());
    let guest = agent.read_clock().await?;
    let error = nanoseconds(start.elapsed() / 2);
    let host = before.duration_since(UNIX_EPOCH).map(nanoseconds).unwrap_or_default();
    Ok(Difference { ahead: host.saturating_add(error).saturating_sub(guest), error })
}

fn nanoseconds(time: Duration) -> i64 {
    // Enough until the year 2262.
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// The rate of the host's clock, in the units of adjtimex(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    frequency: i64,
    tick: i64,
    tai: i64,
}

impl Rate {
    fn of_host() -> Self {
        // SAFETY: all fields are numbers, of which zero is one; no mode means that nothing is changed.
        let mut clock: libc::timex = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes to one living structure.
        unsafe { libc::adjtimex(&raw mut clock) };
        Self { frequency: clock.freq, tick: clock.tick, tai: clock.tai.into() }
    }
}

/// The steps of the host's clock.
struct Steps(AsyncFd<OwnedFd>);

impl Steps {
    fn watch() -> io::Result<Self> {
        let timer = TimerFd::new(
            ClockId::CLOCK_REALTIME,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        timer.set(
            Expiration::OneShot(TimeSpec::seconds(NEVER)),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET,
        )?;
        Ok(Self(watched_fd(OwnedFd::from(timer))?))
    }

    /// Waits for the next step.
    async fn next(&self) {
        loop {
            // Only a runtime that ends makes this fail.
            let Ok(mut ready) = self.0.readable().await else { return pending().await };
            // A step ends the reading with ECANCELED, and the timer goes on.
            match read(self.0.get_ref(), &mut [0; 8]) {
                Err(Errno::ECANCELED) => return,
                _ => ready.clear_ready(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_slewed_and_large_ones_are_steps() {
        let correction = |ahead, error, stepped| Difference { ahead, error }.correction(stepped);
        assert_eq!(correction(900_000, 0, true), (0, 0));
        assert_eq!(correction(-4_000_000, 5_000_000, true), (0, 0));
        assert_eq!(correction(-4_000_000, 1_000_000, false), (0, -4000));
        assert_eq!(correction(4_000_000, 1_000_000, true), (4000, 0));
        assert_eq!(correction(-50_000_000, 1_000_000, false), (-50_000, 0));
        // What a guest may claim.
        assert_eq!(correction(i64::MIN, 0, false), (i64::MIN / 1000, 0));
    }

    #[test]
    fn the_hosts_rate_can_be_read() {
        let rate = Rate::of_host();
        // As adjtimex(2) bounds them.
        assert!((9000..=11_000).contains(&rate.tick), "{rate:?}");
        assert!(rate.frequency.abs() <= 500 << 16, "{rate:?}");
    }

    #[tokio::test]
    async fn without_a_step_there_is_nothing_to_hear() {
        let steps = Steps::watch().unwrap();
        tokio::time::timeout(Duration::from_millis(50), steps.next()).await.unwrap_err();
    }
}
