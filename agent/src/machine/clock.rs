//! The guest's clock, which the host compares with its own.

use std::io;

use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use crate::init::calls;

const MICROSECONDS: i64 = 1_000_000;

/// A change of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockChange {
    /// Microseconds by which the clock jumps.
    pub step: i64,
    /// Microseconds by which it moves little by little; 0 also ends an earlier move.
    pub slew: i64,
    /// Parts per million, with 16 fractional bits.
    pub frequency: i64,
    /// Microseconds in a tick of `USER_HZ`.
    pub tick: i64,
    /// Seconds from UTC to TAI.
    pub tai: i64,
}

/// Returns the nanoseconds since the epoch.
pub fn read() -> io::Result<i64> {
    Ok(clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds())
}

/// Changes the clock.
pub fn adjust(change: &ClockChange) -> io::Result<()> {
    calls::adjust_clock(rate(change))?;
    // A call that does this can do nothing else.
    calls::adjust_clock(libc::timex {
        modes: libc::ADJ_OFFSET_SINGLESHOT,
        offset: change.slew,
        ..calls::no_clock_change()
    })?;
    if change.step != 0 {
        calls::adjust_clock(step(change.step))?;
    }
    Ok(())
}

fn rate(change: &ClockChange) -> libc::timex {
    libc::timex {
        modes: libc::ADJ_FREQUENCY | libc::ADJ_TICK | libc::ADJ_TAI,
        freq: change.frequency,
        tick: change.tick,
        constant: change.tai,
        ..calls::no_clock_change()
    }
}

/// The kernel wants a fraction that is not negative.
fn step(microseconds: i64) -> libc::timex {
    let time = libc::timeval {
        tv_sec: microseconds.div_euclid(MICROSECONDS),
        tv_usec: microseconds.rem_euclid(MICROSECONDS),
    };
    libc::timex { modes: libc::ADJ_SETOFFSET, time, ..calls::no_clock_change() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_back_has_a_positive_fraction() {
        for (microseconds, seconds, fraction) in [
            (1, 0, 1),
            (-1, -1, 999_999),
            (-3_000_000, -3, 0),
            (2_500_000, 2, 500_000),
            (i64::MIN, -9_223_372_036_855, 224_192),
        ] {
            let change = step(microseconds);
            assert_eq!((change.time.tv_sec, change.time.tv_usec), (seconds, fraction));
        }
    }
}
