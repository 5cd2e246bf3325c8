//! A container's part of the shared folder: `<id>/rootfs`, and its volumes.

use std::path::PathBuf;
use std::sync::Arc;

use super::share::Point;
use super::{ResourceError, Rootfs, RootfsMount, Share, SharedVolume};

/// A container's part of the shared folder. Dropping unmounts everything in reverse and removes
/// the folders.
#[derive(Debug)]
pub struct ContainerShare {
    // In the order of dropping.
    _volumes: Vec<Arc<SharedVolume>>,
    _rootfs: Rootfs,
    _folder: Point,
}

impl ContainerShare {
    /// Lays out the container `id`, one name without a slash, in the shared folder.
    pub fn create(
        share: &Arc<Share>,
        id: &str,
        rootfs: &[RootfsMount],
        volumes: Vec<Arc<SharedVolume>>,
    ) -> Result<Self, ResourceError> {
        let folder = Point::folder(share, PathBuf::from(id))?;
        let root = Point::folder(share, PathBuf::from(id).join("rootfs"))?;
        let rootfs = Rootfs::mount(rootfs, root)?;
        Ok(Self { _volumes: volumes, _rootfs: rootfs, _folder: folder })
    }
}
