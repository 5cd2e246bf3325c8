//! An interrupt that nobody hears.

use std::io;

use husk_vmm::vm::{MsiMessage, MsiVector};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Triggered and routed without effect.
pub struct Interrupt(EventFd);

impl Interrupt {
    /// A new one.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(EFD_NONBLOCK)?))
    }
}

impl MsiVector for Interrupt {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
    fn event(&self) -> &EventFd {
        &self.0
    }
    fn route(&self, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
}
