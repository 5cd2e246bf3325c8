//! The packet header (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;

/// The only socket type: streams.
pub const STREAM: u16 = 1;

/// What a packet is for.
pub mod op {
    /// Wants to connect.
    pub const REQUEST: u16 = 1;
    /// Has accepted.
    pub const RESPONSE: u16 = 2;
    /// Refuses, or has gone.
    pub const RST: u16 = 3;
    /// Will not send, receive, or both any more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells its credit.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the other side's.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of a shutdown: will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a shutdown: will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;

/// A header, by value: the guest cannot change it after it was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's context.
    pub src_cid: u64,
    /// Receiver's context.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, see [`op`].
    pub op: u16,
    /// Flags, by operation.
    pub flags: u32,
    /// Sender's buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its buffer so far.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads one.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_virtio_vsock() {
        // The crate's layout is the judge; its own parser wants a descriptor layout that drivers
        // need not keep.
        assert_eq!(HEADER, virtio_vsock::packet::PKT_HEADER_SIZE);
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 77,
            kind: STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0xaabb_ccdd,
            fwd_cnt: u32::MAX,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), header);
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
    }
}
