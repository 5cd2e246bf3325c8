//! What makes two looks at the host's files looks at one file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::system::{Status, check};

/// File systems on which device and inode number name one inode as long as it lives: ext2 to ext4, XFS,
/// Btrfs, tmpfs and F2FS. On overlayfs they do not: linked names of a lower layer have one number until a
/// copy-up parts them.
const EXACT: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0xf2f5_2010];

/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY: i64 = 0x794c_7630;

/// Device, inode number, time of birth and type of a file, and for a directory its mount: the same
/// directory bound to two places is two, as each has a parent of its own.
///
/// A number is given to a new file when the old one is gone; the time of birth tells the two apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
    born: (i64, u32),
    kind: u32,
    mount: u64,
}

impl Identity {
    /// Returns the identity of the file of that status.
    pub fn of(status: &Status) -> Self {
        Self {
            device: status.device,
            inode: status.inode(),
            born: status.born(),
            kind: status.mode() & libc::S_IFMT,
            mount: if status.is_folder() { status.mount } else { 0 },
        }
    }

    /// Returns the `S_IFMT` bits, which never change.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// Returns the mount of a directory.
    pub fn mount(&self) -> u64 {
        self.mount
    }

    /// Whether the file system says when a file was made, so that a reused number is noticed.
    pub fn has_birth(&self) -> bool {
        self.born != (0, 0)
    }

    /// Whether the file behind `path`, of identity `now` and found where `self` was, is `self`. On
    /// overlayfs with layers of several file systems, a directory's number lasts only as long as the
    /// kernel caches the directory.
    pub fn is_at(&self, now: &Self, path: &File) -> bool {
        if self == now {
            return true;
        }
        self.kind == libc::S_IFDIR
            && self.has_birth()
            && Self { inode: now.inode, ..*self } == *now
            && file_system(path).is_ok_and(|kind| kind == OVERLAY)
    }
}

/// Whether on the file system of `file` device and inode number name one inode as long as it lives.
pub fn is_exact(file: &File) -> io::Result<bool> {
    Ok(EXACT.contains(&file_system(file)?))
}

fn file_system(file: &File) -> io::Result<i64> {
    let mut status = std::mem::MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: `status` has room for one result.
    check(unsafe { libc::fstatfs64(file.as_raw_fd(), status.as_mut_ptr()) })?;
    // SAFETY: zeroed is a valid value, and the call has written over it.
    Ok(unsafe { status.assume_init() }.f_type)
}

/// What is one file system to the guest: a mount of the share with what lies on it, or the volumes of one
/// device.
#[derive(Debug)]
pub struct Domain {
    number: u64,
    /// The device whose inode numbers are shown as they are; not known of a group of volumes without any.
    device: OnceLock<u64>,
    is_group: bool,
    others: Mutex<Vec<u64>>,
}

/// Bits of an inode number that are left to the host's file system if there are several in a domain.
const NUMBER_BITS: u32 = 56;

impl Domain {
    /// Makes a domain whose root is on `device`.
    pub fn new(number: u64, device: u64) -> Self {
        Self { number, device: device.into(), is_group: false, others: Mutex::default() }
    }

    /// Makes a domain of volumes that are on one device: that of the first.
    pub fn group(number: u64) -> Self {
        Self { number, device: OnceLock::new(), is_group: true, others: Mutex::default() }
    }

    /// Whether it is a group of volumes.
    pub fn is_group(&self) -> bool {
        self.is_group
    }

    /// Whether a volume on `device`, found where the group's volumes are, is part of the group.
    pub fn takes_in(&self, device: u64) -> bool {
        self.is_group && *self.device.get_or_init(|| device) == device
    }

    /// Returns the number, which no other domain of the server has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether inode numbers of `device` are shown as they are.
    pub fn is_of(&self, device: u64) -> bool {
        self.device.get() == Some(&device)
    }

    /// Returns the inode number that the guest sees. To it all of the domain is one device, so files of
    /// another device (an overlay's layers can be on several, a bound file on any) must not have a
    /// number of the root's.
    pub fn inode(&self, status: &Status) -> u64 {
        let inode = status.inode();
        if self.is_of(status.device) {
            return inode;
        }
        // No holder of the lock can panic half way, so poison means nothing.
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        let known = others.iter().position(|device| *device == status.device);
        let index = known.unwrap_or_else(|| {
            others.push(status.device);
            others.len() - 1
        });
        let prefix = (index as u64 + 1) << NUMBER_BITS;
        inode ^ prefix
    }

    /// Returns the status as the guest sees it.
    pub fn show(&self, status: Status) -> Status {
        status.numbered(self.inode(&status))
    }
}
