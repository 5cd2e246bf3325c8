//! The frames of FUSE messages (Linux `include/uapi/linux/fuse.h`), in host byte order.

use crate::fuse::{self, IN_HEADER};

/// Bytes of an answer's header.
pub const OUT_HEADER: usize = 16;

/// What the frame of a request says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InHeader {
    /// Bytes in all.
    pub len: u32,
    /// What is asked.
    pub opcode: u32,
    /// The request's number, which the answer repeats.
    pub unique: u64,
}

impl InHeader {
    /// Reads it.
    pub fn decode(bytes: &[u8; IN_HEADER]) -> Self {
        let [l0, l1, l2, l3, o0, o1, o2, o3, u0, u1, u2, u3, u4, u5, u6, u7, ..] = *bytes;
        Self {
            len: u32::from_ne_bytes([l0, l1, l2, l3]),
            opcode: u32::from_ne_bytes([o0, o1, o2, o3]),
            unique: u64::from_ne_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
        }
    }

    /// Whether there will be an answer.
    pub fn wants_answer(&self) -> bool {
        fuse::wants_answer(self.opcode)
    }
}

/// What the frame of an answer says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutHeader {
    /// Bytes in all.
    pub len: u32,
    /// Zero, or a negative error number.
    pub error: i32,
    /// The number of the request.
    pub unique: u64,
}

impl OutHeader {
    /// An answer that is only an error.
    pub fn failure(errno: i32, unique: u64) -> Self {
        Self { len: 16, error: -errno, unique }
    }

    /// Reads it.
    pub fn decode(bytes: &[u8; OUT_HEADER]) -> Self {
        let [l0, l1, l2, l3, e0, e1, e2, e3, u0, u1, u2, u3, u4, u5, u6, u7] = *bytes;
        Self {
            len: u32::from_ne_bytes([l0, l1, l2, l3]),
            error: i32::from_ne_bytes([e0, e1, e2, e3]),
            unique: u64::from_ne_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
        }
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; OUT_HEADER] {
        let mut bytes = [0; OUT_HEADER];
        bytes[0..4].copy_from_slice(&self.len.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.unique.to_ne_bytes());
        bytes
    }
}
