//! The door to fuse-backend-rs: each request, led to the place that answers it.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use super::Tree;
use super::begin::wanted;
use super::credentials::User;

fn act_for(context: &Context) {
    User::new(context.uid, context.gid).act();
}

fn not_known() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSYS)
}

impl FileSystem for &Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.begin(capable);
        Ok(wanted())
    }

    fn destroy(&self) {
        self.forget_all();
    }

    fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if let Some(entry) = self.repeat.look_up(context, parent, name) {
            return Ok(entry);
        }
        act_for(context);
        self.look_up(parent, name)
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        self.nodes.forget([(node, count)]);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        self.nodes.forget(requests);
    }

    fn getattr(
        &self,
        context: &Context,
        node: u64,
        _: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        act_for(context);
        self.attributes(node)
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attributes: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        act_for(context);
        if self.repeat.changes(context, node) {
            return self.attributes(node);
        }
        self.set_attributes(node, attributes, handle, valid)
    }

    fn readlink(&self, context: &Context, node: u64) -> io::Result<Vec<u8>> {
        act_for(context);
        self.read_link(node)
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        act_for(context);
        self.make_link(target, parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        if let Some(entry) = self.repeat.create(context, parent, name, mode) {
            return Ok(entry);
        }
        act_for(context);
        self.make_node(parent, name, mode, device, umask)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        if let Some(entry) = self.repeat.create(context, parent, name, libc::S_IFDIR) {
            return Ok(entry);
        }
        act_for(context);
        self.make_folder(parent, name, mode, umask)
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        if self.repeat.remove(context, parent, name).is_some() {
            return Ok(());
        }
        act_for(context);
        self.remove(parent, name, 0)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        if self.repeat.remove(context, parent, name).is_some() {
            return Ok(());
        }
        act_for(context);
        self.remove(parent, name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        context: &Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        if from == to && self.repeat.rename(context, from, (old, new)).is_some() {
            return Ok(());
        }
        act_for(context);
        self.move_entry((from, old), (to, new), flags)
    }

    fn link(&self, context: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        act_for(context);
        self.hard_link(node, parent, name)
    }

    fn open(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        act_for(context);
        if self.repeat.changes(context, node) {
            let (handle, options) = self.open_file(node, libc::O_RDONLY.cast_unsigned(), false)?;
            return Ok((Some(handle), options & !OpenOptions::KEEP_CACHE, None));
        }
        let kill = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let (handle, options) = self.open_file(node, flags, kill)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        act_for(context);
        let (entry, handle, options) = self.create_file(parent, name, args)?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        self.read_file(handle, writer, size, offset)
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        from_cache: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let append = !from_cache && flags.cast_signed() & libc::O_APPEND != 0;
        self.write_file(handle, reader, size, offset, append, fuse_flags & WRITE_KILL_PRIV)
    }

    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        // Nothing is held back here, and the guest does not ask again.
        Err(not_known())
    }

    fn fsync(&self, _: &Context, _: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.sync_file(handle, data_only)
    }

    fn fallocate(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.allocate(handle, mode, offset, length)
    }

    fn release(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(handle)
    }

    fn statfs(&self, context: &Context, node: u64) -> io::Result<libc::statvfs64> {
        act_for(context);
        self.file_system_status(node)
    }

    fn setxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.repeat.announce(context, node, name, value)?;
        act_for(context);
        self.set_extended(node, name, value, flags)
    }

    fn getxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        act_for(context);
        self.get_extended(node, name, size)
    }

    fn listxattr(&self, context: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        act_for(context);
        // The guest's kernel does not filter the list, and does not say who has `CAP_SYS_ADMIN`.
        self.list_extended(node, size, context.uid == 0)
    }

    fn removexattr(&self, context: &Context, node: u64, name: &CStr) -> io::Result<()> {
        act_for(context);
        self.remove_extended(node, name)
    }

    fn opendir(
        &self,
        context: &Context,
        node: u64,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        act_for(context);
        let (handle, options) = self.open_folder(node)?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(handle, size, offset, add)
    }

    fn readdirplus(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        act_for(context);
        self.list_with_entries(node, handle, size, offset, add)
    }

    fn fsyncdir(&self, _: &Context, _: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.sync_file(handle, data_only)
    }

    fn releasedir(&self, _: &Context, _: u64, _: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle)
    }

    fn access(&self, _: &Context, _: u64, _: u32) -> io::Result<()> {
        // The guest's kernel checks permissions itself, and does not ask again.
        Err(not_known())
    }

    fn lseek(&self, _: &Context, _: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.seek(handle, offset, whence)
    }
}
