//! Listings.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::PoisonError;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry, OpenOptions};

use super::Tree;
use super::node::Node;
use super::system::{Status, check_length, descriptor_name, open};

/// The most bytes of entries taken from the kernel at once.
const LISTING: usize = 32 * 1024;

/// Bytes before the name in `struct linux_dirent64`: number, offset, length, type.
const BEFORE_NAME: usize = 19;

impl Tree {
    pub(super) fn open_folder(&self, node: u64) -> io::Result<(u64, OpenOptions)> {
        let node = self.node(node)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let slot = self.handles.reserve()?;
        let handle = self.handles.of(slot, self.open_node(&node, flags, false)?, flags);
        Ok((self.opened(&node, handle)?, OpenOptions::empty()))
    }

    /// Gives `add` the entries from `offset` on, until it has no more room (0) or there are no more.
    /// The guest's offsets are those of [`Positions`](super::position::Positions).
    pub(super) fn list(
        &self,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle)?;
        // An entry is no longer in an answer than here, so this never fetches much too few.
        let mut bytes = vec![0_u8; LISTING.min(size as usize)];
        // No holder of the lock can panic half way, so poison means nothing.
        let mut positions = handle.positions.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = positions.host(offset)?;
        let count = read_entries(&handle.file, offset, &mut bytes)?;
        let mut rest = &bytes[..count];
        let mut first = true;
        while let Some((mut entry, length)) = parse(rest) {
            let added = positions.guest(entry.offset).and_then(|offset| {
                entry.offset = offset;
                add(entry)
            });
            match added {
                Ok(0) => break,
                Ok(_) => {}
                // Once there are entries in the answer, it must be given: the guest's counts of
                // lookups depend on it.
                Err(error) if first => return Err(error),
                Err(_) => break,
            }
            first = false;
            rest = &rest[length..];
        }
        Ok(())
    }

    /// As [`Tree::list`], looking up each entry on the way.
    pub(super) fn list_with_entries(
        &self,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let parent = self.node(node)?;
        self.list(handle, size, offset, &mut |listed| {
            // Node 0 lists the name without looking it up: the ways up are not ours to give, and what
            // has just been removed is for the guest to find out.
            let entry = name_of(listed.name)
                .and_then(|name| {
                    let path = self.nodes.open_path(&parent.file, &name).ok()?;
                    self.remember(&parent, &name, path).ok()
                })
                .map(|(entry, _)| entry)
                .unwrap_or_default();
            let number = entry.inode;
            let added = add(listed, entry);
            if number != 0 && !matches!(added, Ok(1..)) {
                self.nodes.forget([(number, 1)]);
            }
            added
        })
    }
}

impl Tree {
    /// Opens a volume of the group `node`, whose folder is open as `folder`; `None` if there is none.
    pub(super) fn any_volume(&self, node: &Node, folder: &File) -> io::Result<Option<File>> {
        let mut bytes = vec![0_u8; LISTING];
        let mut offset = 0;
        loop {
            let count = read_entries(folder, offset, &mut bytes)?;
            let mut rest = &bytes[..count];
            if rest.is_empty() {
                return Ok(None);
            }
            while let Some((entry, length)) = parse(rest) {
                let path = name_of(entry.name).map(|name| self.nodes.open_path(folder, &name));
                // One that has just gone has been written out.
                if let Some(Ok(path)) = path
                    && node.domain.is_of(Status::of(&path)?.device)
                {
                    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
                    return open(&self.descriptors, &descriptor_name(&path), flags, 0).map(Some);
                }
                offset = entry.offset;
                rest = &rest[length..];
            }
        }
    }
}

/// Fills `bytes` with entries of the folder from the host's position `offset` on; how many bytes.
fn read_entries(folder: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let folder = folder.as_raw_fd();
    // SAFETY: plain numbers.
    if unsafe { libc::lseek64(folder, offset.cast_signed(), libc::SEEK_SET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `bytes` has the room it says.
    let count =
        unsafe { libc::syscall(libc::SYS_getdents64, folder, bytes.as_mut_ptr(), bytes.len()) };
    check_length(isize::try_from(count).unwrap_or(-1))
}

fn name_of(bytes: &[u8]) -> Option<std::ffi::CString> {
    if matches!(bytes, b"." | b"..") {
        return None;
    }
    std::ffi::CString::new(bytes).ok()
}

/// One `struct linux_dirent64`, and its length.
fn parse(bytes: &[u8]) -> Option<(DirEntry<'_>, usize)> {
    let number = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let length = usize::from(u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?));
    let name = CStr::from_bytes_until_nul(bytes.get(BEFORE_NAME..length)?).ok()?;
    let entry = DirEntry {
        ino: number(0)?,
        offset: number(8)?,
        type_: u32::from(*bytes.get(18)?),
        name: name.to_bytes(),
    };
    Some((entry, length))
}
