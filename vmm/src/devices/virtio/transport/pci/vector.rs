//! An interrupt source that can be masked without losing what comes meanwhile.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vm::{MsiMessage, MsiVector};

/// One entry's interrupt source.
///
/// Masking does not unwire it from KVM, which is slow: a masked one only notes that it was raised
/// and raises when it is unmasked. Only one that is raised through [`MsiVector::event`] (vhost) is
/// unwired: what is written to the descriptor meanwhile stays in it, and is raised by the wiring.
pub struct MaskableVector {
    wire: Box<dyn MsiVector>,
    gate: Mutex<Gate>,
}

struct Gate {
    masked: bool,
    pending: bool,
    routed: Option<MsiMessage>,
    /// Somebody raises it by its descriptor.
    by_event: bool,
}

impl MaskableVector {
    /// Masked, and wired to nothing.
    pub fn new(wire: Box<dyn MsiVector>) -> Self {
        let gate = Gate { masked: true, pending: false, routed: None, by_event: false };
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
    pub fn mask(&self) -> io::Result<()> {
        let mut gate = self.gate();
        gate.masked = true;
        if gate.by_event && gate.routed.take().is_some() {
            self.wire.route(None)?;
        }
        Ok(())
    }

    /// Whether something is held back.
    pub fn is_pending(&self) -> bool {
        let gate = self.gate();
        gate.pending || gate.masked && gate.by_event && is_raised(self.wire.event())
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
        let mut gate = self.gate();
        gate.by_event = true;
        if gate.masked && gate.routed.take().is_some() {
            // If that fails the vector passes by the mask, which harms nobody but its guest.
            let _ = self.wire.route(None);
        }
        self.wire.event()
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        match message {
            Some(message) => self.unmask(message),
            None => self.mask(),
        }
    }
}

/// Whether something has been written to an eventfd that nobody has read.
fn is_raised(event: &EventFd) -> bool {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer and the count are those of one structure; it does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
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
