//! The content of files.

use std::io;
use std::os::fd::AsRawFd;

use fuse_backend_rs::abi::fuse_abi::WRITE_KILL_PRIV;
use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};

use super::Tree;
use super::credentials::without_fsetid;
use super::handle::BorrowedFile;
use super::system::{check, check_length};

impl Tree {
    pub(super) fn read_file(
        &self,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle)?;
        handle.opener.act();
        // The size is the guest's word, the room our own.
        let size = (size as usize).min(writer.available_bytes());
        writer.write_from(&mut handle.borrowed(), size, offset)
    }

    pub(super) fn write_file(
        &self,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        append: bool,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handles.get(handle)?;
        // Pages of the guest's cache are written in nobody's name, to whatever handle is open.
        handle.opener.act();
        if handle.append_only() && !append {
            // A mapped page, or a guest that has taken O_APPEND away: the host would append it.
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        without_fsetid(fuse_flags & WRITE_KILL_PRIV != 0, || {
            if append {
                // Such a descriptor writes at the end, whatever the offset says.
                let file = handle.appending(&self.descriptors)?;
                reader.read_to(&mut BorrowedFile::of(file), size as usize, offset)
            } else {
                reader.read_to(&mut handle.borrowed(), size as usize, offset)
            }
        })
    }

    pub(super) fn sync_file(&self, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handles.get(handle)?;
        handle.opener.act();
        if data_only { handle.file.sync_data() } else { handle.file.sync_all() }
    }

    pub(super) fn sync_file_system(&self, node: u64) -> io::Result<()> {
        let node = self.node(node)?;
        let mut file = self.open_node(&node, libc::O_RDONLY, false)?;
        // The guest names the root of its file system, which of a group of volumes is on none of them.
        if node.domain.is_group() && node.mount == self.nodes.root_mount() {
            match self.any_volume(&node, &file)? {
                Some(volume) => file = volume,
                None => return Ok(()),
            }
        }
        // SAFETY: plain numbers.
        check(unsafe { libc::syncfs(file.as_raw_fd()) }).map(drop)
    }

    pub(super) fn allocate(
        &self,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handles.get(handle)?;
        handle.opener.act();
        let file = handle.file.as_raw_fd();
        // SAFETY: plain numbers; the kernel refuses those that make no sense.
        check(unsafe {
            libc::fallocate64(file, mode.cast_signed(), offset.cast_signed(), length.cast_signed())
        })
        .map(drop)
    }

    pub(super) fn seek(&self, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let whence = whence.cast_signed();
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let handle = self.handles.get(handle)?;
        // SAFETY: plain numbers.
        let at = unsafe { libc::lseek64(handle.file.as_raw_fd(), offset.cast_signed(), whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    }

    /// The answer's payload: `struct fuse_write_out`.
    pub(super) fn copy_range(
        &self,
        (from, from_offset): (u64, u64),
        (to, to_offset): (u64, u64),
        length: u64,
    ) -> io::Result<Vec<u8>> {
        let from = self.handles.get(from)?;
        let to = self.handles.get(to)?;
        to.opener.act();
        let mut from_offset = from_offset.cast_signed();
        let mut to_offset = to_offset.cast_signed();
        // The answer has 32 bits for the count.
        let length = usize::try_from(length.min(1 << 30)).unwrap_or(0);
        // SAFETY: both offsets are ours to write to.
        let count = check_length(unsafe {
            libc::copy_file_range(
                from.file.as_raw_fd(),
                &mut from_offset,
                to.file.as_raw_fd(),
                &mut to_offset,
                length,
                0,
            )
        })?;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Ok([count.to_ne_bytes(), [0; 4]].concat())
    }
}
