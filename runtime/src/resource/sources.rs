//! Files and folders of the host's, opened where containerd sees them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};

use super::detached::{Detached, errno, find};
use super::mount_table::MountTable;
use super::{MountOptions, VolumeKind};
use crate::apart::HostMounts;

/// Where sources are opened.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    host: HostMounts,
    own: Option<PathBuf>,
}

/// A source that was opened once: everything known of it is of the same file.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) mount: Detached,
    pub(super) kind: VolumeKind,
    pub(super) identity: Identity,
    /// Whether file systems are mounted beneath it.
    pub(super) has_mounts: bool,
}

/// The identity of a source, for as long as a mount of it is held: that keeps its inode, whose number can be
/// given to no other file meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    /// The mount that it lies on and those beneath it, as the kernel's table describes them.
    mounts: Vec<Vec<u8>>,
}

impl Sources {
    /// Sources in containerd's mount namespace `host`, but for those in the folder `own`: the calling
    /// thread's namespace has them.
    pub fn new(host: HostMounts, own: PathBuf) -> Self {
        Self { host, own: Some(own) }
    }

    /// The mount namespace that paths from containerd are meant in.
    pub(super) fn host(&self) -> &HostMounts {
        &self.host
    }

    /// Says what a path is, following links.
    pub fn kind(&self, path: &Path) -> io::Result<VolumeKind> {
        self.mounts_of(path).within(|| VolumeKind::of(path))
    }

    /// Opens `path`, following links, and clones its mount as `options` say.
    pub(super) fn open(&self, path: &Path, options: &MountOptions) -> io::Result<Opened> {
        self.mounts_of(path).within(|| Opened::open(path, options))
    }

    fn mounts_of(&self, path: &Path) -> HostMounts {
        match &self.own {
            Some(own) if path.starts_with(own) => HostMounts::default(),
            _ => self.host.clone(),
        }
    }
}

impl Opened {
    fn open(path: &Path, options: &MountOptions) -> io::Result<Self> {
        let source = find(path)?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let status = rustix::fs::statx(&source, c"", AtFlags::EMPTY_PATH, wanted).map_err(errno)?;
        let kind = VolumeKind::of_mode(status.stx_mode.into());
        let mount = Detached::clone_of(&source, options)?;
        let path = path_of(&source)?;
        let table = MountTable::read()?;
        let beneath = table.beneath(status.stx_mnt_id, &path);
        let identity = Identity {
            device: (status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            mounts: table.at(status.stx_mnt_id).into_iter().chain(beneath.clone()).collect(),
            path,
        };
        Ok(Self { mount, kind, identity, has_mounts: !beneath.is_empty() })
    }
}

/// The path of an open file without links.
pub(super) fn path_of(file: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd()))
}
