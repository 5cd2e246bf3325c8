//! The device's saved state.

use serde::{Deserialize, Serialize};

/// The version this code writes and the only one it reads.
pub const STATE_VERSION: u16 = 1;

/// A saved [`super::Mem`]. What is in the plugged blocks is guest memory, saved with the rest of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    pub(super) version: u16,
    /// The first address of the range.
    pub(super) base: u64,
    /// Bytes of a block.
    pub(super) block: u64,
    /// How many blocks there can be.
    pub(super) count: u64,
    /// Bytes that are to be plugged.
    pub(super) requested: u64,
    /// The numbers of the blocks that are.
    pub(super) plugged: Vec<u64>,
}
