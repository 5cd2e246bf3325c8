//! The volumes of a sandbox: what several containers bind is bound once.
//!
//! Each bound volume is a file system of its own to the guest. Only if two containers have the same
//! one do they share more than the bytes of a file: a socket's other end, a lock, a mapped page.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use super::volume::BoundVolume;
use super::{Folder, ResourceError, Volume};
use crate::lock::lock;

/// The folder of the volumes in the shared folder; no container has such a name.
pub const VOLUMES: &str = ".volumes";

/// All volumes of one sandbox.
#[derive(Debug)]
pub struct Volumes {
    folder: Folder,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    volumes: HashMap<Key, Weak<SharedVolume>>,
    next: u64,
}

/// What makes two volumes the same: the path, what is there now, and the options.
type Key = (PathBuf, u64, u64, Vec<String>);

/// A volume as long as a container has it. Dropping the last one unbinds it.
#[derive(Debug)]
pub struct SharedVolume {
    name: String,
    _bound: BoundVolume,
}

impl SharedVolume {
    /// Its name in the folder of volumes. Names are never used again: the guest may remember one.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Volumes {
    /// In the shared folder `share`.
    pub fn create(share: &Path) -> std::io::Result<Self> {
        Ok(Self { folder: Folder::create(share.join(VOLUMES))?, held: Mutex::default() })
    }

    /// The volume, bound now or by another container before.
    pub fn take(&self, volume: &Volume) -> Result<Arc<SharedVolume>, ResourceError> {
        let source = &volume.source;
        let look = |error| ResourceError::Source { path: source.clone(), source: error };
        let real = source.canonicalize().map_err(look)?;
        let metadata = real.metadata().map_err(look)?;
        let key = (real, metadata.dev(), metadata.ino(), volume.options.clone());
        let mut held = lock(&self.held);
        held.volumes.retain(|_, volume| volume.strong_count() != 0);
        if let Some(volume) = held.volumes.get(&key).and_then(Weak::upgrade) {
            return Ok(volume);
        }
        let name = held.next.to_string();
        held.next += 1;
        let bound = BoundVolume::bind(volume, self.folder.path().join(&name))?;
        let shared = Arc::new(SharedVolume { name, _bound: bound });
        held.volumes.insert(key, Arc::downgrade(&shared));
        Ok(shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_with_the_same_source_have_the_same_volume() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: binding needs root");
            return;
        }
        // Nothing that is bound here is to reach the machine.
        let bound = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let place = tempfile::tempdir().unwrap();
            let source = place.path().join("source");
            std::fs::create_dir(&source).unwrap();
            std::fs::write(source.join("file"), "text").unwrap();
            let volumes = Volumes::create(place.path()).unwrap();
            let volume = |options: &[&str]| Volume {
                source: source.clone(),
                options: options.iter().map(|&option| option.to_owned()).collect(),
            };
            let first = volumes.take(&volume(&["rbind"])).unwrap();
            let second = volumes.take(&volume(&["rbind"])).unwrap();
            assert_eq!(first.name(), second.name());
            let other = volumes.take(&volume(&["rbind", "ro"])).unwrap();
            assert_ne!(first.name(), other.name());
            let path = place.path().join(VOLUMES).join(first.name());
            drop(first);
            assert_eq!(std::fs::read_to_string(path.join("file")).unwrap(), "text");
            drop(second);
            assert!(!path.exists());
            let again = volumes.take(&volume(&["rbind"])).unwrap();
            assert!(!path.ends_with(again.name()));
            drop((again, other, volumes));
            assert!(!place.path().join(VOLUMES).exists());
        });
        bound.join().unwrap();
    }
}
