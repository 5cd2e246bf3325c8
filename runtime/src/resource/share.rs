//! A container's part of the shared folder: `<id>/rootfs`, and its volumes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::{Folder, MountOptionsError, Rootfs, RootfsMount, SharedVolume};

/// Why a container's files could not be laid out.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A folder or file of ours could not be made.
    #[error("cannot make {path}")]
    Place {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A volume's source cannot be looked at.
    #[error("cannot use {path}")]
    Source {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error("cannot mount {what} on {target}")]
    Mount {
        /// What.
        what: String,
        /// Where.
        target: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A mount option that cannot be granted.
    #[error(transparent)]
    Options(#[from] MountOptionsError),
    /// A mount's place inside the root file system leads out of it.
    #[error("the mount target {0} leads out of the root file system")]
    OutsideTarget(String),
}

/// A container's part of the shared folder. Dropping unmounts everything in reverse and removes
/// the folders.
#[derive(Debug)]
pub struct ContainerShare {
    // In the order of dropping.
    _volumes: Vec<Arc<SharedVolume>>,
    _rootfs: Rootfs,
    _folders: [Folder; 2],
}

impl ContainerShare {
    /// Lays out the container `id` in the shared folder.
    pub fn create(
        share: &Path,
        id: &str,
        rootfs: &[RootfsMount],
        volumes: Vec<Arc<SharedVolume>>,
    ) -> Result<Self, ResourceError> {
        let make = |path: PathBuf| {
            Folder::create(path.clone()).map_err(|source| ResourceError::Place { path, source })
        };
        let container = make(share.join(id))?;
        let root = make(container.path().join("rootfs"))?;
        let rootfs = Rootfs::mount(rootfs, root.path())?;
        // Inner folders go before the outer one.
        Ok(Self { _volumes: volumes, _rootfs: rootfs, _folders: [root, container] })
    }
}
