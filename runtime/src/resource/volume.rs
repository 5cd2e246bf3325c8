//! Files and folders of the host's, bound into the shared folder.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::rootfs::bind;
use super::{Folder, MountOptions, ResourceError};

/// A file or folder of the host's that a container is to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// Mount options as text; `ro` holds on the host already, whatever the guest does.
    pub options: Vec<String>,
}

/// What a path on the host is, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeKind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// A device.
    Device,
    /// A socket or FIFO: its other end is on the host, out of a guest's reach.
    Endpoint,
}

impl VolumeKind {
    /// Looks at a path, following links.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        Ok(if kind.is_dir() {
            Self::Folder
        } else if kind.is_file() {
            Self::File
        } else if kind.is_block_device() || kind.is_char_device() {
            Self::Device
        } else {
            Self::Endpoint
        })
    }
}

/// A bound volume; dropping unbinds it and removes where it was bound.
#[derive(Debug)]
pub(super) struct BoundVolume {
    // In the order of dropping: first the mount, then what it was on.
    _bound: Bound,
    _place: Place,
}

#[derive(Debug)]
enum Place {
    Folder { _folder: Folder },
    File(PathBuf),
}

#[derive(Debug)]
struct Bound(PathBuf);

impl BoundVolume {
    pub(super) fn bind(volume: &Volume, target: PathBuf) -> Result<Self, ResourceError> {
        let options = MountOptions::parse(&volume.options)?;
        let source = &volume.source;
        let look = |error| ResourceError::Source { path: source.clone(), source: error };
        let make = |error| ResourceError::Place { path: target.clone(), source: error };
        let place = match VolumeKind::of(source).map_err(look)? {
            VolumeKind::Folder => {
                Place::Folder { _folder: Folder::create(target.clone()).map_err(make)? }
            }
            _ => {
                File::create_new(&target).map_err(make)?;
                Place::File(target.clone())
            }
        };
        bind(source, &target, &options).map_err(|error| ResourceError::Mount {
            what: source.display().to_string(),
            target: target.clone(),
            source: error,
        })?;
        Ok(Self { _bound: Bound(target), _place: place })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::File(path) = self {
            // Fails while something is mounted on it: then it is not ours to remove.
            let _ = std::fs::remove_file(path);
        }
    }
}
