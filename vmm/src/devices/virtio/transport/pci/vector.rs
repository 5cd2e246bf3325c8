//! An interrupt source that can be masked without losing what comes meanwhile.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vm::{MsiMessage, MsiVector};

/// One entry's interrupt source.
///
/// Masking does not unwire it from KVM, which is slow: a masked one only notes that it was raised
/// and raises when it is unmasked. Whoever raises it through [`MsiVector::event`] (vhost) passes by
/// the mask.
pub struct MaskableVector {
    wire: Box<dyn MsiVector>,
    gate: Mutex<Gate>,
}

struct Gate {
    masked: bool,
    pending: bool,
    routed: Option<MsiMessage>,
}

impl MaskableVector {
    /// Masked, and wired to nothing.
    pub fn new(wire: Box<dyn MsiVector>) -> Self {
        let gate = Gate { masked: true, pending: false, routed: None };
        Self { wire, gate: Mutex::new(gate) }
    }

    /// Sends to `message` from now on, at once if it was raised while masked.
    pub fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        let mut gate = self.gate();
        if gate.routed != Some(message) {
            self.wire.route(Some(message))?;
            gate.routed = Some(message);
        }
        gate.masked = false;
        if std::mem::take(&mut gate.pending) { self.wire.trigger() } else { Ok(()) }
    }

    /// Holds back what is raised.
    pub fn mask(&self) {
        self.gate().masked = true;
    }

    /// Whether something is held back.
    pub fn is_pending(&self) -> bool {
        self.gate().pending
    }

    /// Holds back an interrupt, or forgets the one held back.
    pub fn set_pending(&self, pending: bool) {
        self.gate().pending = pending;
    }

    fn gate(&self) -> std::sync::MutexGuard<'_, Gate> {
        // Nothing in here panics half-way, so a poisoned gate is still sound.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiVector for MaskableVector {
    fn trigger(&self) -> io::Result<()> {
        let mut gate = self.gate();
        if gate.masked {
            gate.pending = true;
            return Ok(());
        }
        self.wire.trigger()
    }

    fn event(&self) -> &EventFd {
        self.wire.event()
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        match message {
            Some(message) => self.unmask(message),
            None => {
                self.mask();
                Ok(())
            }
        }
    }
}

/// For a queue whose driver asked for no interrupts: raising it does nothing.
pub struct NoVector {
    event: EventFd,
}

impl NoVector {
    /// One that goes nowhere.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }
}

impl MsiVector for NoVector {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
}
