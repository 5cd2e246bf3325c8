//! What the machine and the file server must agree on of FUSE's messages: each takes them apart by
//! itself, but on a channel they fall out of step if one of them expects an answer and the other not.
//!
//! Source: `include/uapi/linux/fuse.h`. All numbers are in the host's byte order.

/// Bytes of `struct fuse_in_header`.
pub(crate) const IN_HEADER: usize = 40;

/// The most data in one message.
pub(crate) const LONGEST_DATA: u32 = 1 << 20;

/// The longest message either way: the data, and a page for what goes before (fuse-backend-rs allows
/// one).
pub(crate) const LONGEST: usize = LONGEST_DATA as usize + 4096;

pub(crate) const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
pub(crate) const DESTROY: u32 = 38;
pub(crate) const NOTIFY_REPLY: u32 = 41;
pub(crate) const BATCH_FORGET: u32 = 42;

/// Whether there will be an answer to a request of that opcode.
pub(crate) fn wants_answer(opcode: u32) -> bool {
    !matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | NOTIFY_REPLY)
}
