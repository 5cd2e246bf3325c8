//! Inode flags, as lsattr(1) and chattr(1) show and set them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::Tree;
use super::system::{Status, check};
use crate::files::message::InodeFlags;

const GET_FLAGS: libc::Ioctl = 0x8008_6601;
const SET_FLAGS: libc::Ioctl = 0x4008_6602;
const GET_EXTENDED: libc::Ioctl = 0x801c_581f;
const SET_EXTENDED: libc::Ioctl = 0x401c_5820;

/// `FS_IMMUTABLE_FL` and `FS_APPEND_FL`.
const PROTECTING: u32 = 0x10 | 0x20;
/// `FS_XFLAG_IMMUTABLE` and `FS_XFLAG_APPEND`.
const PROTECTING_EXTENDED: u32 = 0x8 | 0x10;
/// Bytes of `struct fsxattr`, and where its project id is.
const EXTENDED: usize = 28;
const PROJECT: usize = 12;

impl Tree {
    /// Does what the ioctl asks on an open file. The answer's payload: `struct fuse_ioctl_out` and the
    /// data.
    pub(super) fn inode_flags(&self, handle: u64, request: InodeFlags) -> io::Result<Vec<u8>> {
        let handle = self.handles.get(handle)?;
        let file = &handle.file;
        let mut payload = vec![0; 16];
        match request {
            InodeFlags::Get => payload.extend_from_slice(&flags(file)?.to_ne_bytes()),
            InodeFlags::Set(wanted) => {
                self.on_volume_only(file, wanted & !flags(file)? & PROTECTING != 0)?;
                // The kernel reads 32 bits, whatever the number of the call says.
                let wanted = libc::c_long::from(wanted.cast_signed());
                // SAFETY: `wanted` outlives the call, which reads it.
                check(unsafe { libc::ioctl(file.as_raw_fd(), SET_FLAGS, &raw const wanted) })?;
            }
            InodeFlags::GetExtended => payload.extend_from_slice(&extended(file)?),
            InodeFlags::SetExtended(wanted) => {
                let before = extended(file)?;
                let protecting = word(&wanted, 0) & !word(&before, 0) & PROTECTING_EXTENDED != 0;
                let project = word(&wanted, PROJECT) != word(&before, PROJECT);
                self.on_volume_only(file, protecting || project)?;
                // SAFETY: the call reads as many bytes as `wanted` has.
                check(unsafe { libc::ioctl(file.as_raw_fd(), SET_EXTENDED, wanted.as_ptr()) })?;
            }
        }
        Ok(payload)
    }

    /// Refuses what may be changed on volumes only: a root file system with a file that is immutable
    /// or append-only could not be removed, and a project id evades its quota.
    fn on_volume_only(&self, file: &File, changed: bool) -> io::Result<()> {
        if changed && !self.mounts.of(Status::of(file)?.mount).volume {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(())
    }
}

fn flags(file: &File) -> io::Result<u32> {
    let mut flags: libc::c_long = 0;
    // SAFETY: `flags` has room for what the call writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET_FLAGS, &raw mut flags) })?;
    // The kernel writes 32 bits, whatever the number of the call says.
    Ok(word(&flags.to_ne_bytes(), 0))
}

fn extended(file: &File) -> io::Result<[u8; EXTENDED]> {
    let mut bytes = [0; EXTENDED];
    // SAFETY: `bytes` has room for what the call writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET_EXTENDED, bytes.as_mut_ptr()) })?;
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}
