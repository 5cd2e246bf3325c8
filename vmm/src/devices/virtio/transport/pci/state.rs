//! The transport's saved state.

use serde::{Deserialize, Serialize};

use super::common::Common;
use super::msix::MsixState;
use crate::bus::pci::ConfigSpaceState;
use crate::devices::virtio::state::QueuePosition;

/// The version this code writes and the only one it reads.
pub const STATE_VERSION: u16 = 1;

/// A saved transport: everything between the guest and the device, the device's progress in its
/// queues included. The device's own state is apart, and is restored first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciState {
    pub(super) version: u16,
    pub(super) device_type: u32,
    pub(super) config: ConfigSpaceState,
    pub(super) common: Common,
    pub(super) msix: MsixState,
    pub(super) isr: u8,
    /// Empty unless the device is live.
    pub(super) positions: Vec<QueuePosition>,
}
