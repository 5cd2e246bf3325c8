//! The few devices a PC has that a kernel touches without being asked.

mod i8042;
mod pvpanic;
mod serial;

pub use i8042::{I8042, I8042State};
pub use pvpanic::{PvPanic, PvPanicState};
pub use serial::{LimitedLog, Serial, SerialState};

/// A saved state is of another version than this one knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("saved state of {device}, version {version}, is not understood")]
pub struct LegacyStateError {
    device: &'static str,
    version: u16,
}
