//! What saved states of devices have in common.

use serde::{Deserialize, Serialize};

/// How far a device has come in a queue. The queue's place in memory is the transport's to save.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Index of the next entry to take from the available ring.
    pub next_avail: u16,
    /// Index of the next entry to put into the used ring.
    pub next_used: u16,
}

/// Why a device cannot be saved now.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SaveError {
    /// Requests of the guest's are still under way; try again once they are answered.
    #[error("{0} requests of the guest are still under way")]
    Busy(usize),
}

/// Why a saved state cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Saved by another version of Husk.
    #[error("saved state has version {found}, this husk-vmm knows {known}")]
    Version {
        /// The state's.
        found: u16,
        /// Ours.
        known: u16,
    },
    /// It does not fit the device it is to be restored into.
    #[error("saved state does not fit the device: {0}")]
    Mismatch(&'static str),
    /// The device's part of PCI configuration space.
    #[error("PCI configuration space")]
    Config(#[from] crate::bus::pci::ConfigSpaceError),
    /// A descriptor the device works with failed.
    #[error("device descriptor")]
    Io(#[from] std::io::Error),
    /// The device did not take the restored queues.
    #[error("device activation")]
    Activate(#[from] super::ActivateError),
}

/// Refuses any version but the one known.
pub fn check_version(found: u16, known: u16) -> Result<(), RestoreError> {
    if found == known { Ok(()) } else { Err(RestoreError::Version { found, known }) }
}
