//! What a container is given: its root file system and volumes in the shared folder, and the
//! machine's size.
//!
//! All mounts are made in the shim's private mount namespace, so the host's table never shows them
//! and nothing can be left in it. Every mount and folder is owned by a value whose drop undoes it.
//!
//! No file that a guest can write to decides what is mounted, or where: [`share`] has the tree that
//! mounts are attached in, which no guest can change; [`detached`] makes them on descriptors;
//! [`sources`] opens what they are of, once.

mod cgroup;
mod changes;
mod container_share;
mod cpuset;
mod detached;
mod error;
mod folder;
mod guest_memory;
mod memory;
mod mount_options;
mod mount_table;
pub mod network;
mod overlay;
mod rootfs;
mod share;
mod sizing;
mod sources;
mod volume;
mod volumes;

pub use cgroup::{CgroupError, HostCgroup, remove_cgroup};
pub use changes::{Change, ChangeKind, Changes};
pub use container_share::ContainerShare;
pub use cpuset::{Cpuset, CpusetError};
pub use error::ResourceError;
pub use folder::Folder;
pub use guest_memory::MemoryVolume;
pub(crate) use guest_memory::{is_bind, is_shared_memory};
pub use memory::Memory;
pub use mount_options::{MountOptions, MountOptionsError};
pub use rootfs::{Rootfs, RootfsMount};
pub use share::Share;
pub use sizing::{Limits, Sizing, SizingRules};
pub use sources::Sources;
pub use volume::{Volume, VolumeKind};
pub use volumes::{SharedVolume, VOLUMES, Volumes};
