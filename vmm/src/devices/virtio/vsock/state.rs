//! The device's saved state.

use serde::{Deserialize, Serialize};

/// The version this code writes and the only one it reads.
pub const STATE_VERSION: u16 = 1;

/// A saved [`super::Vsock`]: no connections, see the module's docs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    pub(super) version: u16,
    /// The guest's context id.
    pub(super) guest_cid: u64,
}
