//! Names: looking up, creating, linking, renaming, removing.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, EntryOut, FOPEN_IN_KILL_SUIDGID, OpenOut};
use fuse_backend_rs::api::filesystem::{Entry, OpenOptions};
use vm_memory::ByteValued;

use super::credentials::{User, permitted, with_umask, without_fsetid};
use super::node::Node;
use super::open::open_flags;
use super::system::{Status, check, descriptor_name, open, read_link_at};
use super::{Tree, check_name};
use crate::files::message::Header;

/// Nodes that are left to lookups, so that those which come between do no harm to what is being created.
const FOR_LOOKUPS: usize = 1024;

impl Tree {
    pub(super) fn look_up(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.node(parent)?;
        match self.nodes.open_path(&parent.file, check_name(name)?) {
            Ok(path) => Ok(self.remember(&parent, name, path)?.0),
            // "There is none", which the guest may believe as long as a name that is there. Shells
            // look for each command in folder after folder.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let entry_timeout = self.entry_time(&parent);
                Ok(Entry { inode: 0, entry_timeout, ..Entry::default() })
            }
            Err(error) => Err(error),
        }
    }

    /// Fails with `ENFILE` if there is no room for what is to be created: it would be on the host, though
    /// the guest is told that it failed.
    fn has_room_to_create(&self) -> io::Result<()> {
        if self.nodes.room() < FOR_LOOKUPS {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        Ok(())
    }

    /// Creates by `make`, in the name of the asking user, and looks up the result.
    fn make(
        &self,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(&Node) -> libc::c_int,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.node(parent)?;
        self.has_room_to_create()?;
        with_umask(umask, || check(make(&parent)))?;
        let path = self.nodes.open_path(&parent.file, name)?;
        Ok(self.remember(&parent, name, path)?.0)
    }

    pub(super) fn make_folder(
        &self,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(parent, name, umask, |parent| {
            // SAFETY: `name` is terminated and outlives the call.
            unsafe { libc::mkdirat(parent.file.as_raw_fd(), name.as_ptr(), mode) }
        })
    }

    pub(super) fn make_node(
        &self,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        // FUSE carries the kernel's 32 bit form: 8 + 12 bits of minor round 12 bits of major.
        let major = (device >> 8) & 0xfff;
        let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
        let device = libc::makedev(major, minor);
        self.make(parent, name, umask, |parent| {
            // SAFETY: `name` is terminated and outlives the call.
            unsafe { libc::mknodat(parent.file.as_raw_fd(), name.as_ptr(), mode, device) }
        })
    }

    pub(super) fn make_link(&self, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make(parent, name, 0, |parent| {
            // SAFETY: both texts are terminated and outlive the call.
            unsafe { libc::symlinkat(target.as_ptr(), parent.file.as_raw_fd(), name.as_ptr()) }
        })
    }

    pub(super) fn hard_link(&self, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.node(parent)?;
        let node = self.nodes.on_mount(self.node(node)?, parent.mount);
        self.has_room_to_create()?;
        let old = descriptor_name(&node.file);
        permitted(|| {
            // The link followed is the one in /proc, to the node itself, be it a symbolic link or not.
            // SAFETY: both names are terminated and outlive the call.
            check(unsafe {
                libc::linkat(
                    libc::AT_FDCWD,
                    old.as_ptr(),
                    parent.file.as_raw_fd(),
                    name.as_ptr(),
                    libc::AT_SYMLINK_FOLLOW,
                )
            })
        })?;
        // Linking copies up: the node is to be known again by its new name.
        self.attributes(node.number)?;
        let path = self.nodes.open_path(&parent.file, name)?;
        Ok(self.remember(&parent, name, path)?.0)
    }

    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: libc::c_int) -> io::Result<()> {
        check_name(name)?;
        let parent = self.node(parent)?;
        let before = self.nodes.before(&parent, name);
        permitted(|| {
            // SAFETY: `name` is terminated and outlives the call.
            check(unsafe { libc::unlinkat(parent.file.as_raw_fd(), name.as_ptr(), flags) })
        })?;
        self.nodes.removed(before);
        Ok(())
    }

    pub(super) fn move_entry(
        &self,
        (from, old): (u64, &CStr),
        (to, new): (u64, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        check_name(old)?;
        check_name(new)?;
        let from = self.node(from)?;
        let to = self.node(to)?;
        // The whiteout that may be left behind is root's, as with a local overlay.
        if flags & libc::RENAME_WHITEOUT != 0 {
            User::ROOT.act();
        }
        let rename = || {
            // By number, because without flags the C library may call `renameat`, which is on no list.
            // SAFETY: both names are terminated and outlive the call.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_renameat2,
                    from.file.as_raw_fd(),
                    old.as_ptr(),
                    to.file.as_raw_fd(),
                    new.as_ptr(),
                    flags,
                )
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        self.nodes.rename((&from, old), (&to, new), exchange, || permitted(rename))
    }

    pub(super) fn read_link(&self, node: u64) -> io::Result<Vec<u8>> {
        read_link_at(&self.node(node)?.file)
    }

    pub(super) fn create_file(
        &self,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        check_name(name)?;
        let parent = self.node(parent)?;
        self.has_room_to_create()?;
        let slot = self.handles.reserve()?;
        // Bits the kernel does not know go nowhere: the list in `open_flags` is what passes.
        let flags = open_flags(args.flags);
        let create = flags | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        let created =
            with_umask(args.umask, || open(&parent.file, name, create, args.mode & 0o7777));
        let (path, created) = match created {
            Ok(file) => (self.path_of(&file)?, Ok(self.handles.of(slot, file, flags))),
            Err(error)
                if error.raw_os_error() == Some(libc::EEXIST)
                    && args.flags.cast_signed() & libc::O_EXCL == 0 =>
            {
                (self.nodes.open_path(&parent.file, name)?, Err(slot))
            }
            Err(error) => return Err(error),
        };
        let (mut entry, node) = self.remember(&parent, name, path)?;
        let opened = match created {
            Ok(handle) => {
                let options = if self.mounts.of(parent.mount).made_on_reading {
                    OpenOptions::DIRECT_IO
                } else {
                    OpenOptions::empty()
                };
                Ok((handle, options))
            }
            // It was there already, and may be a device or a FIFO.
            Err(slot) => {
                let kill = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                self.open_content(slot, &node, args.flags, kill)
            }
        };
        let opened = opened
            .and_then(|(handle, options)| Ok((self.opened(&node, handle)?, options)))
            .inspect_err(|_| self.nodes.forget([(node.number, 1)]));
        let (handle, options) = opened?;
        if flags & libc::O_TRUNC != 0 {
            entry.attr = self.attributes(node.number)?.0;
        }
        Ok((entry, handle, options))
    }

    /// A nameless file in the folder `header.node`; the answer is that of a create.
    pub(super) fn create_temporary(
        &self,
        header: &Header,
        flags: u32,
        mode: u32,
        umask: u32,
    ) -> io::Result<Vec<u8>> {
        let parent = self.node(header.node)?;
        if !parent.may_be_opened() || parent.is_regular() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        let slot = self.handles.reserve()?;
        let flags = open_flags(flags) | libc::O_TMPFILE | (flags.cast_signed() & libc::O_EXCL);
        let file = with_umask(umask, || {
            open(&self.descriptors, &descriptor_name(&parent.file), flags, mode & 0o7777)
        })?;
        let path = self.path_of(&file)?;
        let status = Status::of(&path)?;
        let node = self.nodes.remember_nameless(&parent, path, &status)?;
        let handle = self.opened(&node, self.handles.of(slot, file, flags));
        let opened = OpenOut {
            fh: handle.inspect_err(|_| self.nodes.forget([(node.number, 1)]))?,
            open_flags: OpenOptions::empty().bits(),
            passthrough: 0,
        };
        let entry = self.entry(&parent, &node, status);
        let mut payload = EntryOut::from(entry).as_slice().to_vec();
        payload.extend_from_slice(opened.as_slice());
        Ok(payload)
    }

    /// An `O_PATH` descriptor of an open file.
    fn path_of(&self, file: &File) -> io::Result<File> {
        open(&self.descriptors, &descriptor_name(file), libc::O_PATH, 0)
    }

    /// Opens a node for its content.
    pub(super) fn open_node(
        &self,
        node: &Node,
        flags: libc::c_int,
        kill_privileges: bool,
    ) -> io::Result<File> {
        // Opening a device would reach the host's device, and opening a FIFO may never return.
        if !node.may_be_opened() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let name = descriptor_name(&node.file);
        let file = without_fsetid(kill_privileges, || {
            permitted(|| open(&self.descriptors, &name, flags, 0))
        })?;
        // Opening for writing copies up.
        if flags & libc::O_ACCMODE != libc::O_RDONLY {
            self.nodes.observe(node, &Status::of(&node.file)?);
        }
        Ok(file)
    }
}
