//! Volumes that containers share.
//!
//! The volumes on one device of the host's are in one mount in the share; others are mounts of their own.
//! The kernel makes such a mount when a path first leads into it, anew in each mount namespace. Made before
//! in the agent's, from which containers' are cloned, it is the same for all of them: then they share its
//! sockets, locks and pages. With its last volume the mount is taken away, or the host could not unmount
//! what lies under it; with another one the kernel lets go of what it remembers.
//!
//! Each step asks the host's file system, which may never answer. So all run in threads, under no lock:
//!
//! ```text
//!   (unknown) ──held──▶ in use ──last one goes──▶ being unmounted ──▶ (unknown)
//!                          ▲                             │
//!                          └── held meanwhile, then ─────┘
//! ```

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_agent_protocols::SHARE_PATH;
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;
use rustix::fs::CWD;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};
use tokio::sync::Notify;

use crate::apart::{alongside, within};

/// How long the volumes of a container may take to be mounted.
const MOUNT_LIMIT: Duration = Duration::from_secs(15);

/// How long the end of a container waits for them to be unmounted.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(3);

/// Names from the share to a volume that is a mount of its own; one that is in a mount with others has one
/// more.
const DEPTH: usize = 2;

/// The volumes of all containers.
#[derive(Debug, Default)]
pub struct Volumes {
    mounts: Mutex<HashMap<PathBuf, Mount>>,
    /// Notified when one has been unmounted.
    unmounted: Notify,
}

/// A mount that has volumes.
#[derive(Debug, Default)]
struct Mount {
    /// How many containers have each volume.
    volumes: HashMap<PathBuf, usize>,
    /// Whether it may be mounted: a file that is in no mount with others is not.
    mounted: bool,
    unmounting: bool,
}

/// The work that is due for a mount when a volume is let go.
#[derive(Debug, PartialEq, Eq)]
enum Release {
    Nothing,
    /// The volume has gone, others in the mount have not.
    Shrink,
    Unmount,
}

/// A container's volumes, for as long as this lives.
#[derive(Debug)]
pub struct HeldVolumes {
    volumes: Arc<Volumes>,
    paths: BTreeSet<PathBuf>,
}

impl Volumes {
    /// Mounts the volumes of `spec` that no container has yet; `TimedOut` if one of them does not answer.
    pub async fn hold(self: &Arc<Self>, spec: &Spec) -> io::Result<HeldVolumes> {
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
        let paths = sources.filter(|path| path.starts_with(Path::new(SHARE_PATH))).cloned();
        self.hold_all(paths.collect(), MOUNT_LIMIT).await
    }

    async fn hold_all(
        self: &Arc<Self>,
        paths: BTreeSet<PathBuf>,
        limit: Duration,
    ) -> io::Result<HeldVolumes> {
        let held = HeldVolumes { volumes: Arc::clone(self), paths };
        {
            let mut mounts = self.mounts();
            for path in &held.paths {
                mounts.entry(mount_of(path).to_owned()).or_default().add(path);
            }
        }
        if held.paths.is_empty() {
            return Ok(held);
        }
        let mounting = async {
            self.until_unmounted(&held.paths).await;
            let paths = held.paths.clone();
            alongside(move || paths.into_iter().filter(|path| !enter(path)).collect()).await
        };
        let others: Vec<_> = within(limit, mounting).await?;
        let mut mounts = self.mounts();
        for path in others {
            if let Some(mount) = mounts.get_mut(&path) {
                mount.mounted = false;
            }
        }
        drop(mounts);
        Ok(held)
    }

    /// Waits until none of `paths` is being unmounted.
    async fn until_unmounted(&self, paths: &BTreeSet<PathBuf>) {
        loop {
            let unmounted = self.unmounted.notified();
            let busy = |path: &PathBuf| {
                self.mounts().get(mount_of(path)).is_some_and(|one| one.unmounting)
            };
            if !paths.iter().any(busy) {
                return;
            }
            unmounted.await;
        }
    }

    fn mounts(&self) -> MutexGuard<'_, HashMap<PathBuf, Mount>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unmounts `path`, which nobody holds, and forgets it.
    async fn unmount(self: Arc<Self>, path: PathBuf) {
        let target = path.clone();
        // EINVAL: it is a file, which is no mount. And without a thread it stays mounted.
        let _ = alongside(move || umount2(&target, MntFlags::MNT_DETACH)).await;
        let mut mounts = self.mounts();
        if let Some(mount) = mounts.get_mut(&path) {
            mount.unmounting = false;
            if mount.volumes.is_empty() {
                mounts.remove(&path);
            }
        }
        drop(mounts);
        self.unmounted.notify_waiters();
    }
}

/// Leads into a volume, which mounts it; whether it is a folder. One that cannot be found fails when it is
/// to be bound.
fn enter(path: &Path) -> bool {
    let flags = libc::O_DIRECTORY | libc::O_PATH;
    File::options().read(true).custom_flags(flags).open(path).is_ok()
}

impl Mount {
    fn add(&mut self, volume: &Path) {
        *self.volumes.entry(volume.to_owned()).or_default() += 1;
        self.mounted = true;
    }

    fn remove(&mut self, volume: &Path) -> Release {
        let Some(holders) = self.volumes.get_mut(volume) else { return Release::Nothing };
        *holders -= 1;
        if *holders > 0 {
            return Release::Nothing;
        }
        self.volumes.remove(volume);
        if self.volumes.is_empty() { Release::Unmount } else { Release::Shrink }
    }
}

/// Returns where the mount is that has the volume.
fn mount_of(volume: &Path) -> &Path {
    let below = volume.strip_prefix(SHARE_PATH).map_or(0, |path| path.components().count());
    volume.ancestors().nth(below.saturating_sub(DEPTH)).unwrap_or(volume)
}

/// Lets the kernel forget what it remembers of a mount's files and nobody uses, so that the host's file
/// server closes them: a new configuration of a file system, be it the same, begins with that.
fn shrink(mount: &Path) -> rustix::io::Result<()> {
    fsconfig_reconfigure(fspick(CWD, mount, FsPickFlags::FSPICK_CLOEXEC)?)
}

impl HeldVolumes {
    /// Lets go of the volumes, and waits a while for those to be unmounted that nobody else has.
    pub async fn release(self) {
        let (volumes, paths) = (Arc::clone(&self.volumes), self.paths.clone());
        drop(self);
        let _ = tokio::time::timeout(UNMOUNT_LIMIT, volumes.until_unmounted(&paths)).await;
    }
}

impl Drop for HeldVolumes {
    fn drop(&mut self) {
        let mut mounts = self.volumes.mounts();
        let mut shrunk = BTreeSet::new();
        for volume in &self.paths {
            let path = mount_of(volume);
            let Some(mount) = mounts.get_mut(path) else { continue };
            match mount.remove(volume) {
                Release::Nothing => {}
                Release::Shrink => {
                    shrunk.insert(path.to_owned());
                }
                Release::Unmount => {
                    shrunk.remove(path);
                    if mount.unmounting {
                        continue;
                    }
                    if mount.mounted {
                        mount.unmounting = true;
                        tokio::spawn(Arc::clone(&self.volumes).unmount(path.to_owned()));
                    } else {
                        mounts.remove(path);
                    }
                }
            }
        }
        for path in shrunk {
            // The worst is that the host's file server keeps a file open for longer.
            tokio::spawn(alongside(move || shrink(&path)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_silent::SilentFs;
    use husk_stage::Stage;

    const LIMIT: Duration = Duration::from_millis(300);

    #[test]
    fn a_mount_goes_with_its_last_volume() {
        let path = |name: &str| Path::new(SHARE_PATH).join(".volumes").join(name);
        assert_eq!(mount_of(&path("0")), path("0"));
        assert_eq!(mount_of(&path("8-1-0/1")), path("8-1-0"));
        let mut mount = Mount::default();
        for volume in ["8-1-0/1", "8-1-0/1", "8-1-0/2"] {
            mount.add(&path(volume));
        }
        assert_eq!(mount.remove(&path("8-1-0/1")), Release::Nothing);
        assert_eq!(mount.remove(&path("8-1-0/1")), Release::Shrink);
        assert_eq!(mount.remove(&path("3")), Release::Nothing);
        assert_eq!(mount.remove(&path("8-1-0/2")), Release::Unmount);
    }

    fn paths(folder: &Path, names: &[&str]) -> BTreeSet<PathBuf> {
        names.iter().map(|name| folder.join(name)).collect()
    }

    #[tokio::test]
    async fn the_last_to_go_unmounts_and_files_are_forgotten() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("0")).expect("a folder");
        std::fs::write(folder.path().join("1"), "").expect("a file");
        let volumes = Arc::<Volumes>::default();
        let both = paths(folder.path(), &["0", "1", "none"]);
        let one = volumes.hold_all(both, LIMIT).await.expect("held");
        let other = volumes.hold_all(paths(folder.path(), &["0"]), LIMIT).await.expect("held");
        let known = || {
            let mounts = volumes.mounts();
            let mut all: Vec<_> = mounts
                .values()
                .flat_map(|mount| &mount.volumes)
                .map(|(path, holders)| (path.file_name().expect("a name").to_owned(), *holders))
                .collect();
            all.sort();
            all
        };
        assert_eq!(known(), [("0".into(), 2), ("1".into(), 1), ("none".into(), 1)]);
        one.release().await;
        assert_eq!(known(), [("0".into(), 1)]);
        other.release().await;
        assert_eq!(known(), []);
    }

    #[test]
    fn a_volume_that_does_not_answer_holds_up_no_other() {
        let test = || {
            let Ok(folder) = Stage::apart() else {
                return husk_skip::skipped("no mount namespace can be had");
            };
            for name in ["silent", "0"] {
                std::fs::create_dir(folder.path().join(name)).expect("a folder");
            }
            let silent = SilentFs::mount(&folder.path().join("silent"));
            let Ok(silent) = silent else { return husk_skip::skipped("no FUSE can be mounted") };
            silent.fall_silent();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("one");
            runtime.block_on(async {
                let volumes = Arc::<Volumes>::default();
                let stuck = paths(folder.path(), &["0", "silent/0"]);
                let (stuck, other) = tokio::join!(
                    volumes.hold_all(stuck, LIMIT),
                    volumes.hold_all(paths(folder.path(), &["0"]), LIMIT)
                );
                assert_eq!(stuck.expect_err("late").kind(), io::ErrorKind::TimedOut);
                other.expect("held").release().await;
                // One that is stuck while it is unmounted takes up no further thread.
                let before = silent.unanswered();
                let again = volumes.hold_all(paths(folder.path(), &["silent/0"]), LIMIT).await;
                assert_eq!(again.expect_err("late").kind(), io::ErrorKind::TimedOut);
                assert_eq!(silent.unanswered(), before);
            });
        };
        husk_skip::spawn(test).join().expect("the test");
    }
}
