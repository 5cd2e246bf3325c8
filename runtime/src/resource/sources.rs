//! Files and folders of the host's, opened where containerd sees them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

use super::detached::{Detached, errno, find};
use super::mount_table::MountTable;
use super::{MountOptions, VolumeKind};
use crate::apart::{HostMounts, OPEN, no_answer};
use crate::lock::lock;

/// Where sources are opened.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    host: HostMounts,
    own: Option<PathBuf>,
    waiting: Arc<Waiting>,
}

/// The sources that threads wait for: how many of each, and since when.
///
/// A source that has not answered one thread for as long as anybody waits is not given a further one, so that
/// a container that is tried again and again takes up no more threads than were there at first.
#[derive(Debug, Default)]
struct Waiting(Mutex<HashMap<PathBuf, (usize, Instant)>>);

impl Waiting {
    /// Does `work` with `path`, unless others have waited for it for `limit` already.
    fn with<T>(
        &self,
        path: &Path,
        limit: Duration,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        {
            let mut waiting = lock(&self.0);
            let (count, since) = waiting.entry(path.to_owned()).or_insert((0, Instant::now()));
            if since.elapsed() >= limit {
                return Err(no_answer(since.elapsed()));
            }
            *count += 1;
        }
        let result = work();
        let mut waiting = lock(&self.0);
        if let Some((count, _)) = waiting.get_mut(path) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(path);
            }
        }
        result
    }
}

/// A source that was opened once: everything known of it is of the same file.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) mount: Detached,
    pub(super) kind: VolumeKind,
    pub(super) identity: Identity,
    /// Whether file systems are mounted beneath it.
    pub(super) has_mounts: bool,
    /// Where the clone has a procfs, relative to the source.
    pub(super) procfs: Vec<PathBuf>,
}

/// The identity of a source, for as long as a mount of it is held: that keeps its inode, whose number can be
/// given to no other file meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    path: PathBuf,
    /// Major and minor number.
    pub(super) device: (u32, u32),
    inode: u64,
    /// The mount that it lies on and those beneath it, as the kernel's table describes them.
    mounts: Vec<Vec<u8>>,
}

impl Sources {
    /// Sources in containerd's mount namespace `host`, but for those in the folder `own`: the calling
    /// thread's namespace has them.
    pub fn new(host: HostMounts, own: PathBuf) -> Self {
        Self { host, own: Some(own), waiting: Arc::default() }
    }

    /// The mount namespace that paths from containerd are meant in.
    pub(super) fn host(&self) -> &HostMounts {
        &self.host
    }

    /// Says what a path is, following links.
    pub fn kind(&self, path: &Path) -> io::Result<VolumeKind> {
        self.ask(path, || VolumeKind::of(path))
    }

    /// Opens `path`, following links, and clones its mount as `options` say.
    pub(super) fn open(&self, path: &Path, options: &MountOptions) -> io::Result<Opened> {
        self.ask(path, || Opened::open(path, options))
    }

    fn ask<T: Send>(
        &self,
        path: &Path,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        self.waiting.with(path, OPEN, || self.mounts_of(path).within(work))
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
        let status = statx(&source, c"", AtFlags::EMPTY_PATH, wanted).map_err(errno)?;
        let kind = VolumeKind::of_mode(status.stx_mode.into());
        let mount = Detached::clone_of(&source, options)?;
        let path = path_of(&source)?;
        let table = MountTable::read()?;
        let beneath = table.beneath(status.stx_mnt_id, &path);
        let mut procfs = Vec::new();
        if options.flags.contains(MsFlags::MS_REC) {
            let found = table.procfs_beneath(status.stx_mnt_id, &path);
            let shown = found.into_iter().filter(|(mount, at)| is_shown(&source, at, *mount));
            procfs.extend(shown.map(|(_, at)| at));
        }
        let identity = Identity {
            device: (status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            mounts: table.at(status.stx_mnt_id).into_iter().chain(beneath.clone()).collect(),
            path,
        };
        Ok(Self { mount, kind, identity, has_mounts: !beneath.is_empty(), procfs })
    }
}

/// Whether the folder `at` beneath `source` is the root of `mount`, and not of one that hides it.
fn is_shown(source: &OwnedFd, at: &Path, mount: u64) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(source, at, flags, Mode::empty(), resolve)
        .and_then(|root| statx(&root, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID))
        .is_ok_and(|status| status.stx_mnt_id == mount)
}

/// The path of an open file without links.
pub(super) fn path_of(file: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_source_that_does_not_answer_is_asked_no_more() {
        let (waiting, path) = (Waiting::default(), Path::new("/silent"));
        let limit = Duration::from_millis(30);
        let (end, never) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(|| waiting.with(path, limit, move || Ok(never.recv().ok())));
            while lock(&waiting.0).is_empty() {
                std::thread::yield_now();
            }
            waiting.with(path, Duration::MAX, || Ok(())).unwrap();
            std::thread::sleep(limit);
            let error = waiting.with(path, limit, || Ok(())).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            waiting.with(Path::new("/other"), limit, || Ok(())).unwrap();
            drop(end);
        });
        // It has answered at last.
        waiting.with(path, limit, || Ok(())).unwrap();
        assert!(lock(&waiting.0).is_empty());
    }
}
