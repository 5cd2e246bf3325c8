//! Mounts on descriptors: made with all their flags while nobody can see them, then attached.
//!
//! The descriptor stands for the mount, so nothing is resolved a second time, and a mount that is to be
//! read-only is so before it can be reached.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;
use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::MountOptions;

/// Flags of every mount of the share. The guest's kernel judges modes and devices itself; on the host
/// nothing in the share is ever executed, and no device in it is ever opened.
const ALWAYS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// `linux/mount.h`: the bits of the access time policy, one field of the attributes.
const ACCESS_TIME: MountAttrFlags = MountAttrFlags::from_bits_retain(0x70);

/// A mount, with those beneath it, that is attached nowhere. Dropping dissolves it.
#[derive(Debug)]
pub(super) struct Detached(OwnedFd);

impl Detached {
    /// Clones the mount that `source` lies on, from `source` downwards, as `options` say: with the mounts
    /// beneath if they are recursive. Gets no later mounts of the host's unless they ask for `slave`.
    pub(super) fn clone_of(source: impl AsFd, options: &MountOptions) -> Result<Self, Errno> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        flags.set(OpenTreeFlags::AT_RECURSIVE, options.flags.contains(MsFlags::MS_REC));
        let tree = Self(open_tree(source, c"", flags).map_err(errno)?);
        let slave = options.propagation.contains(MsFlags::MS_SLAVE);
        let propagation = if slave { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
        set(&tree.0, ALWAYS, propagation, true)?;
        if options.recursive_read_only {
            set(&tree.0, MountAttrFlags::MOUNT_ATTR_RDONLY, MsFlags::empty(), true)?;
        }
        let own = attributes(options.flags);
        if !own.is_empty() {
            set(&tree.0, own, MsFlags::empty(), false)?;
        }
        Ok(tree)
    }

    /// Clones the mount at `path` like [`Detached::clone_of`]. Links are followed.
    pub(super) fn clone_at(path: &Path, options: &MountOptions) -> Result<Self, Errno> {
        Self::clone_of(find(path)?, options)
    }

    /// Makes a new mount of the file system `kind`.
    pub(super) fn new(kind: &str, source: &str, options: &MountOptions) -> Result<Self, Errno> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(errno)?;
        if !source.is_empty() {
            fsconfig_set_string(&context, "source", source).map_err(errno)?;
        }
        for (flag, name) in [
            (MsFlags::MS_RDONLY, "ro"),
            (MsFlags::MS_SYNCHRONOUS, "sync"),
            (MsFlags::MS_DIRSYNC, "dirsync"),
        ] {
            if options.flags.contains(flag) {
                fsconfig_set_flag(&context, name).map_err(errno)?;
            }
        }
        for option in &options.data {
            match option.split_once('=') {
                // Quotes part a security context from other options in one text, which this is not.
                Some((name, value)) if name.ends_with("context") => {
                    fsconfig_set_string(&context, name, value.trim_matches('"'))
                }
                Some((name, value)) => fsconfig_set_string(&context, name, value),
                None => fsconfig_set_flag(&context, option.as_str()),
            }
            .map_err(errno)?;
        }
        fsconfig_create(&context).map_err(errno)?;
        let flags = ALWAYS | attributes(options.flags);
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags).map(Self).map_err(errno)
    }

    /// Whether it refuses to be written to, be it the mount or its file system.
    pub(super) fn is_read_only(&self) -> bool {
        let status = rustix::fs::fstatvfs(&self.0);
        status.is_ok_and(|status| status.f_flag.contains(StatVfsMountFlags::RDONLY))
    }

    /// Attaches the mount on `target`, which must be in the calling thread's mount namespace, and returns
    /// its root.
    pub(super) fn attach(self, target: impl AsFd) -> Result<OwnedFd, Errno> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.0, c"", target, c"", flags).map_err(errno)?;
        Ok(self.0)
    }

    /// The root of the mount.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The root of the mount, for as long as it is attached nowhere.
    pub(super) fn into_root(self) -> OwnedFd {
        self.0
    }
}

/// Opens `path` without a right to its content. Links are followed, and what is mounted when somebody
/// looks is mounted.
pub(super) fn find(path: &Path) -> Result<OwnedFd, Errno> {
    open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC).map_err(errno)
}

/// Makes the mount read-only from which `root` was opened, without those beneath it, and private.
pub(super) fn seal(root: impl AsFd) -> Result<(), Errno> {
    set(root, ALWAYS | MountAttrFlags::MOUNT_ATTR_RDONLY, MsFlags::MS_PRIVATE, false)
}

/// An error of rustix's as one of nix's.
pub(super) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// Returns those of `mount(2)`'s flags that say something about one mount, not about its file system.
fn attributes(flags: MsFlags) -> MountAttrFlags {
    [
        (MsFlags::MS_RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (MsFlags::MS_NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
    ]
    .into_iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(MountAttrFlags::empty(), |all, (_, attribute)| all | attribute)
}

/// Sets attributes, and the propagation unless it is empty, of the mount that `root` is the root of.
fn set(
    root: impl AsFd,
    attributes: MountAttrFlags,
    propagation: MsFlags,
    recursive: bool,
) -> Result<(), Errno> {
    let times = attributes.intersects(ACCESS_TIME);
    let wanted = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: if times { ACCESS_TIME.bits().into() } else { 0 },
        propagation: propagation.bits(),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: a terminated path, and a structure of the size that is said, which is only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}
