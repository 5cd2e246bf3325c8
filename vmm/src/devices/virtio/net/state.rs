//! The device's saved state.

use serde::{Deserialize, Serialize};

/// The version this code writes and the only one it reads.
pub const STATE_VERSION: u16 = 1;

/// A saved [`super::Net`]. A frame that waits for room in the guest is lost, as frames may be, and
/// the buckets of rate limits are full again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    pub(super) version: u16,
    /// How many queue pairs there are.
    pub(super) pairs: u16,
    /// The features offered; the guest relies on them.
    pub(super) features: u64,
    pub(super) mtu: Option<u16>,
    /// The address now; the guest may have changed it.
    pub(super) mac: [u8; 6],
    pub(super) link_up: bool,
    /// What the driver has set, while there is one.
    pub(super) driver: Option<DriverState>,
}

/// What a driver has set over the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriverState {
    /// Queue pairs in use.
    pub(super) pairs: u16,
    /// Offloads the guest takes.
    pub(super) offloads: u64,
}
