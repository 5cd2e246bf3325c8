//! Waiting for what others do.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long what has to come is waited for: much more than an emulated processor of a busy host needs.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// In what time everything of a sandbox has gone.
pub const CLEAN_UP: Duration = Duration::from_secs(30);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks until there is something to see; fails with `what` after `limit`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if since.elapsed() > limit {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Looks until it is so; fails with `what` after `limit`.
pub fn until_true(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<bool>,
) -> Result<()> {
    until(what, limit, || Ok(look()?.then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_until_it_is_so_or_too_late() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok((looks == 3).then_some("seen"))
        };
        assert_eq!(until("third", Duration::from_secs(5), third).expect("seen"), "seen");
        assert_eq!(looks, 3);
        let late = until_true("never", Duration::ZERO, || Ok(false)).expect_err("late");
        assert_eq!(late.to_string(), "never: not within 0ns");
        until_true("broken", Duration::MAX, || bail!("because")).expect_err("an error ends it");
    }
}
