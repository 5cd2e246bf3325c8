//! Attributes in the form of statx(2), with the time of birth.

use std::io;
use std::time::Duration;

use super::Tree;
use super::system::Status;

impl Status {
    /// Seconds and nanoseconds of the last change of attributes or content.
    pub fn change_time(&self) -> (i64, u32) {
        (self.raw.stx_ctime.tv_sec, self.raw.stx_ctime.tv_nsec)
    }

    /// Returns `struct fuse_statx`.
    fn to_fuse(self) -> Vec<u8> {
        let raw = &self.raw;
        let mut bytes = Vec::with_capacity(256);
        let mut add = |part: &[u8]| bytes.extend_from_slice(part);
        // The mount's id is the host's.
        add(&(raw.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME)).to_ne_bytes());
        add(&raw.stx_blksize.to_ne_bytes());
        add(&raw.stx_attributes.to_ne_bytes());
        for number in [raw.stx_nlink, raw.stx_uid, raw.stx_gid] {
            add(&number.to_ne_bytes());
        }
        add(&raw.stx_mode.to_ne_bytes());
        add(&[0; 2]);
        for number in [raw.stx_ino, raw.stx_size, raw.stx_blocks, raw.stx_attributes_mask] {
            add(&number.to_ne_bytes());
        }
        for time in [&raw.stx_atime, &raw.stx_btime, &raw.stx_ctime, &raw.stx_mtime] {
            add(&time.tv_sec.to_ne_bytes());
            add(&time.tv_nsec.to_ne_bytes());
            add(&[0; 4]);
        }
        let device = [raw.stx_rdev_major, raw.stx_rdev_minor, raw.stx_dev_major, raw.stx_dev_minor];
        for number in device {
            add(&number.to_ne_bytes());
        }
        add(&[0; 14 * 8]);
        bytes
    }
}

impl Tree {
    /// The answer's payload: `struct fuse_statx_out`.
    pub(super) fn extended_status(&self, node: u64) -> io::Result<Vec<u8>> {
        let (status, valid): (Status, Duration) = self.status_of(node)?;
        let mut payload = valid.as_secs().to_ne_bytes().to_vec();
        payload.extend_from_slice(&valid.subsec_nanos().to_ne_bytes());
        payload.extend_from_slice(&[0; 4 + 16]);
        payload.extend_from_slice(&status.to_fuse());
        Ok(payload)
    }
}
