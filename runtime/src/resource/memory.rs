//! Small file systems in memory.
//!
//! Files that Husk makes and the guest reaches lie on these and not on the host's /run: they are bounded in
//! bytes and in files, and only the sandbox suffers from a full one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::detached::{Detached, find};
use super::{Folder, MountOptions, ResourceError};

/// A file system in memory on a folder of its own, in the mount namespace of the thread that made it.
/// Dropping takes both away.
#[derive(Debug)]
pub struct Memory {
    root: OwnedFd,
    folder: Folder,
}

impl Memory {
    /// Makes the folder `path` and mounts at most `bytes` bytes in at most `files` files there.
    pub fn create(path: PathBuf, bytes: u64, files: u64) -> Result<Self, ResourceError> {
        let folder = Folder::create(path.clone())
            .map_err(|source| ResourceError::Place { path: path.clone(), source })?;
        let options =
            ["mode=0700".to_owned(), format!("size={bytes}"), format!("nr_inodes={files}")];
        let options = MountOptions::parse(&options)?;
        let mount = || {
            let target = find(folder.path())?;
            Detached::new("tmpfs", "husk", &options)?.attach(target)
        };
        let what = "tmpfs".to_owned();
        let root = mount().map_err(|source| ResourceError::Mount { what, target: path, source })?;
        Ok(Self { root, folder })
    }

    /// The root of the file system.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Unmounts the file system with all that is mounted on it. Can be called again.
    pub fn unmount(&self) {
        unmount(self.path());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Unmounts what is mounted last on `path`, with all that is mounted beneath. `path` must not lead
/// through a folder that a guest can change; a link at its end is not followed.
pub(super) fn unmount(path: &Path) {
    // MNT_DETACH: the file server may hold files open for another moment.
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    // EINVAL, ENOENT: it has gone with what it was mounted beneath.
    let result = umount2(path, flags);
    debug_assert!(matches!(result, Ok(()) | Err(Errno::EINVAL | Errno::ENOENT)), "{result:?}");
}
