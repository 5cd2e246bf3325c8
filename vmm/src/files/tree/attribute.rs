//! Attributes.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::SetattrValid;

use super::Tree;
use super::credentials::{permitted, without_fsetid};
use super::system::{Status, check, descriptor_name};

impl Tree {
    pub(super) fn attributes(&self, node: u64) -> io::Result<(libc::stat64, Duration)> {
        let (status, valid) = self.status_of(node)?;
        Ok((status.into(), valid))
    }

    /// The status of a node, and how long the guest may believe it.
    pub(super) fn status_of(&self, node: u64) -> io::Result<(Status, Duration)> {
        let node = self.node(node)?;
        let status = Status::of(&node.file)?;
        self.nodes.observe(&node, &status);
        let valid = self.attribute_time(&node);
        Ok((node.domain.show(status), valid))
    }

    pub(super) fn set_attributes(
        &self,
        node: u64,
        wanted: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let node = self.node(node)?;
        let name = descriptor_name(&node.file);
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = if valid.contains(SetattrValid::UID) { wanted.st_uid } else { u32::MAX };
            let gid = if valid.contains(SetattrValid::GID) { wanted.st_gid } else { u32::MAX };
            let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
            permitted(|| {
                // SAFETY: the empty name means the descriptor itself.
                check(unsafe {
                    libc::fchownat(node.file.as_raw_fd(), c"".as_ptr(), uid, gid, flags)
                })
            })?;
        }
        // After the owner, as a change of owner takes set-user-id bits away.
        if valid.contains(SetattrValid::MODE) {
            permitted(|| {
                // SAFETY: `name` is terminated; the link followed is the one in /proc.
                check(unsafe {
                    libc::fchmodat(libc::AT_FDCWD, name.as_ptr(), wanted.st_mode & 0o7777, 0)
                })
            })?;
        }
        if valid.contains(SetattrValid::SIZE) {
            if !node.is_regular() {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            // The size is the guest's word; the kernel checks it.
            without_fsetid(valid.contains(SetattrValid::KILL_SUIDGID), || match handle {
                Some(handle) => {
                    let handle = self.handles.get(handle)?;
                    // SAFETY: plain numbers.
                    check(unsafe { libc::ftruncate64(handle.file.as_raw_fd(), wanted.st_size) })
                }
                None => permitted(|| {
                    // SAFETY: `name` is terminated; the link followed is the one in /proc.
                    check(unsafe { libc::truncate64(name.as_ptr(), wanted.st_size) })
                }),
            })?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = [
                time(
                    valid.contains(SetattrValid::ATIME),
                    valid.contains(SetattrValid::ATIME_NOW),
                    (wanted.st_atime, wanted.st_atime_nsec),
                ),
                time(
                    valid.contains(SetattrValid::MTIME),
                    valid.contains(SetattrValid::MTIME_NOW),
                    (wanted.st_mtime, wanted.st_mtime_nsec),
                ),
            ];
            permitted(|| {
                // SAFETY: `name` is terminated, and there are two times as the call wants.
                check(unsafe { libc::utimensat(libc::AT_FDCWD, name.as_ptr(), times.as_ptr(), 0) })
            })?;
        }
        self.attributes(node.number)
    }

    pub(super) fn file_system_status(&self, node: u64) -> io::Result<libc::statvfs64> {
        let node = self.node(node)?;
        let mut status = std::mem::MaybeUninit::<libc::statvfs64>::zeroed();
        // SAFETY: `status` has room for one result.
        check(unsafe { libc::fstatvfs64(node.file.as_raw_fd(), status.as_mut_ptr()) })?;
        // SAFETY: zeroed is a valid value, and the call has written over it.
        Ok(unsafe { status.assume_init() })
    }
}

fn time(set: bool, now: bool, (tv_sec, tv_nsec): (i64, i64)) -> libc::timespec {
    match (set, now) {
        (false, _) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        (true, true) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        (true, false) => libc::timespec { tv_sec, tv_nsec },
    }
}
