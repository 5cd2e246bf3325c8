//! How a machine ends: the first reason given counts.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use husk_control::EndReason;
use vmm_sys_util::eventfd::EventFd;

/// Given to all who can end the machine, from any thread.
pub struct EndSignal {
    reason: Mutex<Option<EndReason>>,
    ended: AtomicBool,
    expected: AtomicBool,
    event: EventFd,
}

impl EndSignal {
    /// A signal not given yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            ended: AtomicBool::new(false),
            expected: AtomicBool::new(false),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// The next reset is the orderly end.
    pub fn expect(&self) {
        self.expected.store(true, Ordering::SeqCst);
    }

    /// The guest reset itself.
    pub fn reset(&self) {
        self.end(if self.expected.load(Ordering::SeqCst) {
            EndReason::PoweredOff
        } else {
            EndReason::Reset
        });
    }

    /// The machine ends for this reason.
    pub fn end(&self, reason: EndReason) {
        self.lock().get_or_insert(reason);
        self.ended.store(true, Ordering::SeqCst);
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.event.write(1);
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Why it has ended, if it has.
    pub fn reason(&self) -> Option<EndReason> {
        self.lock().clone()
    }

    /// Readable once it has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn lock(&self) -> MutexGuard<'_, Option<EndReason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let end = EndSignal::new().unwrap();
        assert!(!end.has_ended());
        end.end(EndReason::Panicked);
        end.reset();
        assert_eq!(end.reason(), Some(EndReason::Panicked));
        assert!(end.event().read().is_ok());
    }

    #[test]
    fn an_expected_reset_is_a_power_off() {
        let end = EndSignal::new().unwrap();
        end.expect();
        end.reset();
        assert_eq!(end.reason(), Some(EndReason::PoweredOff));
    }
}
