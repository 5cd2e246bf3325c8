//! The file system under the FUSE messages: the shared folder, as a local file system would show it.
//!
//! fuse-backend-rs brings a `PassthroughFs` of its own, which is not used: it lets ".." through, leaves
//! out "." and ".." of listings, keeps a record of every file ever seen (or stops at 255 mounts), and
//! does not show submounts, umask with default ACLs, temporary files or ranges copied on the host.
//!
//! Rules, as the guest is hostile:
//!
//! - A name is one component: not empty, ".", "..", and without "/". Every system call takes one such
//!   name relative to an `O_PATH` descriptor, never follows a symbolic link, and so cannot leave the
//!   folder.
//! - Only regular files and folders are ever opened; devices, FIFOs and sockets are the guest's own.
//! - The permission checks are the guest kernel's (`default_permissions`), as they are against the
//!   ids it keeps. The server acts with all rights over the folder, with the asking user as the owner
//!   of what it creates.

mod attribute;
mod begin;
mod cached;
mod credentials;
mod data;
mod directory;
mod entry;
mod extended;
mod file_system;
mod handle;
mod hold;
mod identity;
mod inode_flags;
mod mounts;
mod names;
mod node;
mod open;
mod own_process;
mod position;
mod repeat;
mod statx;
mod system;
mod table;
mod trusted;
mod validity;
mod watcher;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::Entry;

use super::FilesError;
use super::message::{Extra, Header};
use credentials::User;
use handle::{Handle, Handles};
use mounts::Mounts;
use node::{Border, Limits, Node, Nodes};
use repeat::Repeat;
use system::Status;
use validity::{OWN_VALIDITY, Validity};

/// `fuse_attr.flags`: the node is the root of another mount, to be one in the guest as well.
const ATTRIBUTE_SUBMOUNT: u32 = 1;

/// The shared folder and what the guest holds of it.
pub struct Tree {
    nodes: Nodes,
    handles: Handles,
    mounts: Mounts,
    validity: Validity,
    repeat: Repeat,
    /// `/proc/self/fd`, through which `O_PATH` descriptors are opened and named.
    descriptors: File,
    /// Whether the guest makes submounts of its own where ours are.
    submounts: AtomicBool,
}

impl Tree {
    /// Serves `folder`, with the mounts on it at any time. `descriptors` is `/proc/self/fd`.
    /// Entries of its folder `volumes` are volumes.
    pub fn new(
        folder: BorrowedFd<'_>,
        descriptors: File,
        volumes: Option<&str>,
    ) -> Result<Self, FilesError> {
        let root = system::open_path(folder, c".").map_err(FilesError::Folder)?;
        let status = Status::of(&root).map_err(FilesError::Folder)?;
        if !status.is_folder() {
            return Err(FilesError::Folder(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        let limits = limits().map_err(FilesError::SetUp)?;
        Ok(Self {
            nodes: Nodes::new(root, &status, limits),
            handles: Handles::new(limits.handles),
            mounts: Mounts::new(volumes),
            validity: Validity::new(),
            repeat: Repeat::default(),
            descriptors,
            submounts: AtomicBool::new(false),
        })
    }

    /// Sets up the calling thread to serve: once on each, before its first message.
    pub fn prepare_thread(&self) -> io::Result<()> {
        credentials::prepare(&self.descriptors)
    }

    /// Answers a request that fuse-backend-rs does not know; the payload of the answer.
    pub fn handle_extra(&self, header: &Header, extra: Extra) -> io::Result<Vec<u8>> {
        User::new(header.uid, header.gid).act();
        match extra {
            Extra::CopyFileRange { from, to, length } => self.copy_range(from, to, length),
            Extra::SyncFs => self.sync_file_system(header.node).map(|()| Vec::new()),
            Extra::TmpFile { flags, mode, umask } => {
                self.create_temporary(header, flags, mode, umask)
            }
            Extra::Init { read_ahead, capable } => Ok(self.begin_extended(read_ahead, capable)),
            Extra::Statx => self.extended_status(header.node),
            Extra::Ioctl { handle, request } => match request {
                Some(request) => self.inode_flags(handle, request),
                None => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
            },
        }
    }

    /// Forgets what the guest holds: it begins anew, or ends.
    pub fn forget_all(&self) {
        self.handles.clear();
        self.nodes.clear();
        self.mounts.clear();
    }

    /// Whether something is held for a burst of requests only.
    pub fn is_busy(&self) -> bool {
        self.nodes.watcher.is_open()
    }

    /// Lets go of what is held for a burst of requests only.
    pub fn rest(&self) {
        self.nodes.watcher.close();
    }

    fn node(&self, number: u64) -> io::Result<Node> {
        self.nodes.get(number)
    }

    /// Remembers the file behind `path` (`O_PATH`), which was found at `name` in `parent`, as one more
    /// thing the guest has looked up.
    fn remember(&self, parent: &Node, name: &CStr, path: File) -> io::Result<(Entry, Node)> {
        let status = Status::of(&path)?;
        let border = self.border(parent, &path, &status)?;
        self.mounts.admit(&parent.file, &status)?;
        let read_only = self.mounts.of(status.mount).read_only;
        let node = self.nodes.remember(parent, name, path, &status, (border, read_only))?;
        let mut entry = self.entry(parent, &node, status);
        if border != Border::None {
            entry.attr_flags = ATTRIBUTE_SUBMOUNT;
        }
        Ok((entry, node))
    }

    /// Returns what begins for the guest at the file behind `path`, which was found in `parent`.
    ///
    /// A mount is a file system of its own. But volumes that the shim has put into one folder because they
    /// are on one device are one file system together, so that a file which several of them have is one.
    fn border(&self, parent: &Node, path: &File, status: &Status) -> io::Result<Border> {
        let crosses = status.mount != parent.mount;
        // No guest can change the folders of the share's own mount.
        let own = parent.mount == self.nodes.root_mount();
        let depth = if own { self.mounts.depth(path)? } else { None };
        if crosses {
            let outer = (parent.mount, depth.is_some());
            self.mounts.enter(outer, path, status, self.validity.times_asked())?;
        }
        let joins = crosses && own && parent.domain.takes_in(status.device);
        Ok(match (crosses, depth) {
            _ if !status.is_folder() || !self.submounts.load(Ordering::Relaxed) => Border::None,
            (true, _) if !joins => Border::Mount,
            (false, Some(1)) => Border::Group,
            _ => Border::None,
        })
    }

    /// Returns what the guest is told of `node`, which was looked up in `parent`.
    fn entry(&self, parent: &Node, node: &Node, status: Status) -> Entry {
        Entry {
            inode: node.number,
            generation: 0,
            attr: node.domain.show(status).into(),
            attr_flags: 0,
            attr_timeout: self.attribute_time(node),
            entry_timeout: self.entry_time(parent),
        }
    }

    /// Adds the handle of a file that was opened for `node`; the handle's number.
    fn opened(&self, node: &Node, handle: Handle) -> io::Result<u64> {
        let file = Arc::clone(&handle.file);
        let number = self.handles.insert(handle);
        let known = self.nodes.opened(node, &file);
        known.map(|()| number).inspect_err(|_| drop(self.handles.remove(number)))
    }

    /// Returns how long the guest may believe a name in `parent`, that there is none too.
    ///
    /// In the folder's own mount, mounts come and go as containers do; few paths lead through it, as a
    /// container's root is a mount below. On volumes the host works at the same time. Names of both are
    /// asked for each time, and the answer brings the attributes.
    fn entry_time(&self, parent: &Node) -> Duration {
        let traits = self.mounts.of(parent.mount);
        let shared = parent.mount == self.nodes.root_mount() || traits.volume;
        if shared { Duration::ZERO } else { self.validity.begin(traits.entered) }
    }

    /// Returns how long the guest may believe a status. No name leads to a volume that is one file: in
    /// the guest it is a mount.
    fn attribute_time(&self, node: &Node) -> Duration {
        if node.mount == self.nodes.root_mount() {
            return OWN_VALIDITY;
        }
        let traits = self.mounts.of(node.mount);
        let bound = traits.volume && node.is_bound;
        if bound { Duration::ZERO } else { self.validity.begin(traits.entered) }
    }
}

/// Descriptors beside those that the guest makes the server hold.
const OWN_DESCRIPTORS: usize = 256;

/// Descriptors that are held at most for nodes that were used lately: each keeps a part of the host's
/// caches from being reclaimed.
const MOST_HELD: usize = 8192;

/// Nodes that the guest may make the server remember: as many as hash tables of 4 Mi buckets hold before
/// they double. They take 2 GB then, and one more would make it 3; those of an honest guest take 3.5 GiB of
/// its own memory, where each is 1 KiB at least.
const MOST_NODES: usize = (4 << 20) / 8 * 7;

/// Returns what the process can afford by its limit of descriptors.
fn limits() -> io::Result<Limits> {
    let descriptors = system::descriptor_limit()?.saturating_sub(OWN_DESCRIPTORS);
    Ok(Limits {
        nodes: MOST_NODES,
        held: (descriptors / 4).min(MOST_HELD),
        pinned: descriptors / 8,
        handles: descriptors / 2,
    })
}

/// One component, and not a way up.
fn check_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}
