//! What a container is given: its root file system and volumes in the shared folder, and the
//! machine's size.
//!
//! All mounts are made in the shim's private mount namespace, so the host's table never shows them
//! and nothing can be left in it. Every mount and folder is owned by a value whose drop undoes it.

mod cgroup;
mod folder;
mod mount_options;
pub mod network;
mod rootfs;
mod share;
mod sizing;
mod volume;
mod volumes;

pub use cgroup::{CgroupError, HostCgroup, remove_cgroup};
pub use folder::Folder;
pub use mount_options::{MountOptions, MountOptionsError};
pub use rootfs::{Rootfs, RootfsMount};
pub use share::{ContainerShare, ResourceError};
pub use sizing::{Limits, Sizing, SizingRules};
pub use volume::{Volume, VolumeKind};
pub use volumes::{SharedVolume, VOLUMES, Volumes};
