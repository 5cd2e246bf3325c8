//! Volumes that containers share.
//!
//! A volume is a mount of its own in the share, which the kernel makes when a path first leads into
//! it, anew in each mount namespace. Made before in the agent's, from which containers' are cloned,
//! it is the same for all of them: then they share its sockets, locks and pages. The last one to go
//! takes it away, or the host could not unmount what lies under it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_agent_protocols::SHARE_PATH;
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;

/// How many containers have each volume.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashMap<PathBuf, usize>>);

/// A container's volumes, for as long as this lives.
#[derive(Debug)]
pub struct HeldVolumes {
    volumes: Arc<Volumes>,
    paths: Vec<PathBuf>,
}

impl Volumes {
    /// Mounts the volumes of `spec` that no container has yet.
    pub fn hold(self: &Arc<Self>, spec: &Spec) -> HeldVolumes {
        let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
        let paths: Vec<_> =
            sources.filter(|path| path.starts_with(Path::new(SHARE_PATH))).cloned().collect();
        let mut counts = self.counts();
        for path in &paths {
            *counts.entry(path.clone()).or_default() += 1;
            // Only a folder is one; one that cannot be opened fails when it is to be bound.
            let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
            let _ = File::options().read(true).custom_flags(flags).open(path);
        }
        HeldVolumes { volumes: Arc::clone(self), paths }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HeldVolumes {
    fn drop(&mut self) {
        let mut counts = self.volumes.counts();
        for path in &self.paths {
            let Some(count) = counts.get_mut(path) else { continue };
            *count -= 1;
            if *count == 0 {
                counts.remove(path);
                // EINVAL: it is a file, which is no mount.
                let _ = umount2(path, MntFlags::MNT_DETACH);
            }
        }
    }
}
