//! Files and folders of the host's, mounted into the shared folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::detached::Detached;
use super::share::Point;
use super::{ResourceError, Share};

/// A file or folder of the host's that a container is to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The path on the host.
    pub source: PathBuf,
    /// Mount options as text; `ro` and `rro` hold on the host already, whatever the guest does.
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
        Ok(Self::of_mode(rustix::fs::stat(path)?.st_mode))
    }

    pub(super) fn of_mode(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => Self::Folder,
            libc::S_IFREG => Self::File,
            libc::S_IFBLK | libc::S_IFCHR => Self::Device,
            _ => Self::Endpoint,
        }
    }
}

/// Attaches `mount`, of a folder or a file, on `name` in the shared folder; dropping the result unmounts
/// it. `source` is for the error.
pub(super) fn attach(
    mount: Detached,
    kind: VolumeKind,
    source: &Path,
    share: &Arc<Share>,
    name: PathBuf,
) -> Result<Point, ResourceError> {
    let mut point = match kind {
        VolumeKind::Folder => Point::folder(share, name)?,
        VolumeKind::File => Point::file(share, name)?,
        VolumeKind::Device | VolumeKind::Endpoint => {
            return Err(ResourceError::Kind { path: source.to_owned() });
        }
    };
    point.attach(mount).map_err(|error| ResourceError::Mount {
        what: source.display().to_string(),
        target: point.path(),
        source: error,
    })?;
    Ok(point)
}
