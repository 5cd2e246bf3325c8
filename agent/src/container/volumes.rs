//! Volumes that containers share.
//!
//! The volumes on one device of the host's are in one mount in the share; others are mounts of their own.
//! The kernel makes such a mount when a path first leads into it, anew in each mount namespace. Made before
//! in the agent's, from which containers' are cloned, it is the same for all of them: then they share its
//! sockets, locks and pages. With its last volume the mount is taken away, or the host could not unmount
//! what lies under it; with another one the kernel lets go of what it remembers.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_agent_protocols::SHARE_PATH;
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;
use rustix::fs::CWD;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};

/// Names from the share to a volume that is a mount of its own; one that is in a mount with others has one
/// more.
const DEPTH: usize = 2;

/// All volumes.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<Counts>);

/// How many containers have each volume, and each mount: a container counts as often as it has it.
#[derive(Debug, Default)]
struct Counts {
    volumes: HashMap<PathBuf, usize>,
    mounts: HashMap<PathBuf, usize>,
}

/// A container's volumes, for as long as this lives.
#[derive(Debug)]
pub struct HeldVolumes {
    volumes: Arc<Volumes>,
    paths: Vec<PathBuf>,
}

/// What is to be done for a mount when a volume is let go.
#[derive(Debug, PartialEq, Eq)]
enum Release {
    Nothing,
    /// The volume has gone, others in the mount have not.
    Shrink,
    Unmount,
}

impl Volumes {
    /// Mounts the volumes of `spec` that no container has yet.
    pub fn hold(self: &Arc<Self>, spec: &Spec) -> HeldVolumes {
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
        let paths: Vec<_> =
            sources.filter(|path| path.starts_with(Path::new(SHARE_PATH))).cloned().collect();
        let mut counts = self.counts();
        for path in &paths {
            counts.add(path);
            // Only a folder is one; one that cannot be opened fails when it is to be bound.
            let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
            let _ = File::options().read(true).custom_flags(flags).open(path);
        }
        HeldVolumes { volumes: Arc::clone(self), paths }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn add(&mut self, volume: &Path) {
        *self.volumes.entry(volume.to_owned()).or_default() += 1;
        *self.mounts.entry(mount_of(volume).to_owned()).or_default() += 1;
    }

    fn remove(&mut self, volume: &Path) -> Release {
        let volume_gone = take_one(&mut self.volumes, volume);
        match (take_one(&mut self.mounts, mount_of(volume)), volume_gone) {
            (true, _) => Release::Unmount,
            (false, true) => Release::Shrink,
            (false, false) => Release::Nothing,
        }
    }
}

/// Counts one less. Returns whether it was the last.
fn take_one(counts: &mut HashMap<PathBuf, usize>, path: &Path) -> bool {
    let Some(count) = counts.get_mut(path) else { return false };
    *count -= 1;
    let last = *count == 0;
    if last {
        counts.remove(path);
    }
    last
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

impl Drop for HeldVolumes {
    fn drop(&mut self) {
        let mut counts = self.volumes.counts();
        let mut shrunk: Vec<&Path> = Vec::new();
        for path in &self.paths {
            let mount = mount_of(path);
            match counts.remove(path) {
                Release::Nothing => {}
                Release::Shrink => shrunk.push(mount),
                Release::Unmount => {
                    shrunk.retain(|other| *other != mount);
                    // EINVAL: it is a file, which is no mount.
                    let _ = umount2(mount, MntFlags::MNT_DETACH);
                }
            }
        }
        shrunk.sort();
        shrunk.dedup();
        for mount in shrunk {
            // The worst is that the host's file server keeps a file open for longer.
            let _ = shrink(mount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_goes_with_its_last_volume() {
        let path = |name: &str| Path::new(SHARE_PATH).join(".volumes").join(name);
        assert_eq!(mount_of(&path("0")), path("0"));
        assert_eq!(mount_of(&path("8-1-0/1")), path("8-1-0"));
        let mut counts = Counts::default();
        for volume in ["8-1-0/1", "8-1-0/1", "8-1-0/2", "3"] {
            counts.add(&path(volume));
        }
        assert_eq!(counts.remove(&path("8-1-0/1")), Release::Nothing);
        assert_eq!(counts.remove(&path("8-1-0/1")), Release::Shrink);
        assert_eq!(counts.remove(&path("3")), Release::Unmount);
        assert_eq!(counts.remove(&path("8-1-0/2")), Release::Unmount);
        assert!(counts.volumes.is_empty() && counts.mounts.is_empty());
        assert_eq!(counts.remove(&path("3")), Release::Nothing);
    }
}
