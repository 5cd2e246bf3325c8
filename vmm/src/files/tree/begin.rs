//! The first message: what the guest's kernel is asked to do.

use std::sync::atomic::Ordering;

use fuse_backend_rs::abi::fuse_abi::{InitOut, KERNEL_VERSION};
use fuse_backend_rs::api::filesystem::FsOptions;
use vm_memory::ByteValued;

use super::Tree;
use crate::fuse::LONGEST_DATA;

/// The version of the protocol that knows the second word of options.
pub const MINOR: u32 = 36;

/// `FUSE_DIRECT_IO_ALLOW_MMAP`: shared mappings of files that are read and written directly.
const DIRECT_MAPPINGS: u64 = 1 << 36;

/// Bytes of a page of the guest's.
const PAGE: u32 = 4096;

/// What the guest's kernel is asked to do, as far as it can.
///
/// Not among them: locks (they are between the guest's processes, and stay with its kernel), a
/// write-back cache (what a container wrote is to be on the host with its right time when it ends),
/// and opening without asking.
pub fn wanted() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::ASYNC_DIO
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::BIG_WRITES
        | FsOptions::CACHE_SYMLINKS
        | FsOptions::DONT_MASK
        | FsOptions::DO_READDIRPLUS
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::INIT_EXT
        | FsOptions::MAX_PAGES
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::POSIX_ACL
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::SUBMOUNTS
}

impl Tree {
    /// Begins anew: a guest that sends this knows nothing of what it held.
    pub(super) fn begin(&self, capable: FsOptions) {
        self.forget_all();
        self.submounts.store(capable.contains(FsOptions::SUBMOUNTS), Ordering::Relaxed);
    }

    /// Answers a kernel that has the second word of options, part of which fuse-backend-rs does not
    /// know; the answer's payload.
    pub(super) fn begin_extended(&self, read_ahead: u32, capable: u64) -> Vec<u8> {
        self.begin(FsOptions::from_bits_truncate(capable));
        let options = capable & (wanted().bits() | DIRECT_MAPPINGS);
        let [low, high] = [options, options >> 32].map(|word| (word & 0xffff_ffff) as u32);
        let answer = InitOut {
            major: KERNEL_VERSION,
            minor: MINOR,
            max_readahead: read_ahead,
            flags: low,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: LONGEST_DATA,
            time_gran: 1,
            max_pages: u16::try_from(LONGEST_DATA / PAGE).unwrap_or(u16::MAX),
            flags2: high,
            ..InitOut::default()
        };
        answer.as_slice().to_vec()
    }
}
