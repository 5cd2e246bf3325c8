//! The shared folder's own tree: its root, the folder of volumes, and each container's.
//!
//! The tree is a small file system in memory with two mounts. The shim makes folders and files through
//! one that is attached nowhere and known to nobody else. The file server, and so the guest, sees the
//! tree through the other, which is read-only: it can rename, link, replace and fill nothing in it. What
//! containers have is mounted on folders of the second and carries flags of its own.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use super::detached::{Detached, errno, seal};
use super::memory::unmount;
use super::{Memory, MountOptions, ResourceError, Sources};

/// Bytes of the tree. Nothing is in it but folders and empty files.
const BYTES: u64 = 64 * 1024;

/// Folders and files of the tree: two for a container, and one for each of its volumes.
const FILES: u64 = 1 << 16;

/// No link is followed, in whichever folder, and nothing leads upwards.
const STRAIGHT: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// The shared folder of a sandbox. Dropping unmounts it.
#[derive(Debug)]
pub struct Share {
    /// The mount that the file server sees.
    served: Memory,
    /// The mount that the shim writes through.
    writable: OwnedFd,
    sources: Sources,
}

impl Share {
    /// Makes the shared folder at `path`, in the mount namespace of the calling thread, for containers
    /// whose files come from `sources`.
    pub fn create(path: PathBuf, sources: Sources) -> Result<Arc<Self>, ResourceError> {
        let served = Memory::create(path.clone(), BYTES, FILES)?;
        // Cloned while it is attached: before Linux 6.15 no mount can be cloned that is not.
        let writable = Detached::clone_of(served.root(), &MountOptions::default())
            .and_then(|writable| seal(served.root()).map(|()| writable.into_root()))
            .map_err(|source| ResourceError::Mount {
                what: "the shared folder".to_owned(),
                target: path,
                source,
            })?;
        Ok(Arc::new(Self { served, writable, sources }))
    }

    /// Opens the shared folder as the file server is to see it.
    pub fn open(&self) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(self.served.root(), c".", flags, Mode::empty());
        root.map(File::from).map_err(errno)
    }

    /// Where sources on the host are opened.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// The path on the host.
    pub fn path(&self) -> &Path {
        self.served.path()
    }

    /// Unmounts it with all that is mounted in it. Can be called again.
    pub fn unmount(&self) {
        self.served.unmount();
    }
}

/// A folder or an empty file in the shared folder's own tree. Dropping unmounts what is mounted on it and
/// removes it.
#[derive(Debug)]
pub(super) struct Point {
    share: Arc<Share>,
    name: PathBuf,
    is_folder: bool,
    mounts: usize,
}

impl Point {
    /// Makes a folder, whose name is relative to the shared folder.
    pub(super) fn folder(share: &Arc<Share>, name: PathBuf) -> Result<Self, ResourceError> {
        let made = rustix::fs::mkdirat(&share.writable, &name, Mode::RWXU);
        Self::made(share, name, true, made)
    }

    /// Makes an empty file, whose name is relative to the shared folder.
    pub(super) fn file(share: &Arc<Share>, name: PathBuf) -> Result<Self, ResourceError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let made = rustix::fs::openat2(&share.writable, &name, flags, mode, STRAIGHT);
        Self::made(share, name, false, made.map(drop))
    }

    fn made(
        share: &Arc<Share>,
        name: PathBuf,
        is_folder: bool,
        made: Result<(), rustix::io::Errno>,
    ) -> Result<Self, ResourceError> {
        let share = Arc::clone(share);
        match made {
            Ok(()) => Ok(Self { share, name, is_folder, mounts: 0 }),
            Err(error) => {
                Err(ResourceError::Place { path: share.path().join(name), source: error.into() })
            }
        }
    }

    /// The path on the host.
    pub(super) fn path(&self) -> PathBuf {
        self.share.path().join(&self.name)
    }

    /// The shared folder.
    pub(super) fn share(&self) -> &Arc<Share> {
        &self.share
    }

    /// Attaches a mount, over what is mounted there already.
    pub(super) fn attach(&mut self, mount: Detached) -> Result<(), Errno> {
        mount.attach(self.top()?)?;
        self.mounts += 1;
        Ok(())
    }

    /// Attaches a mount on the folder `inner` of what is mounted there. A link on the way is an error: it
    /// is the image's or the guest's. Nothing but the mount that it lies on can take it away.
    pub(super) fn attach_inside(&mut self, inner: &str, mount: Detached) -> Result<(), Errno> {
        let target = find_in(self.top()?, Path::new(inner))?;
        mount.attach(target).map(drop)
    }

    /// Takes away what is mounted on the folder `inner` of what is mounted there, with all beneath.
    pub(super) fn uncover(&self, inner: &Path) -> Result<(), Errno> {
        let root = find_in(self.top()?, inner)?;
        // The link leads to the descriptor's file itself: no name is looked up a second time.
        umount2(format!("/proc/thread-self/fd/{}", root.as_raw_fd()).as_str(), MntFlags::MNT_DETACH)
    }

    /// Opens the root of the mount that was attached last.
    fn top(&self) -> Result<OwnedFd, Errno> {
        find_in(self.share.served.root(), &self.name)
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        for _ in 0..self.mounts {
            // No guest can change the folders on the way: they are the tree's own.
            unmount(&self.path());
        }
        let flags = if self.is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        // Refused while something is mounted on it; then it goes with the tree.
        let _ = rustix::fs::unlinkat(&self.share.writable, &self.name, flags);
    }
}

/// Opens `name` beneath `folder`, without a right to its content.
fn find_in(folder: impl AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(folder, name, flags, Mode::empty(), STRAIGHT).map_err(errno)
}
