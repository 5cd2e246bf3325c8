//! The files and folders that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::credentials::{User, permitted};
use super::position::{Positions, Total};
use super::system::{check_length, descriptor_name, open};

/// An open file or folder.
#[derive(Debug)]
pub struct Handle {
    /// Opened with the access that the guest asked for, and appending only if the file allows nothing
    /// else.
    pub file: Arc<File>,
    /// The user who opened it, in whose name it is read and written.
    pub opener: User,
    /// The flags that `file` was opened with.
    flags: libc::c_int,
    /// The same file opened for appending, from the first such write on.
    appending: OnceLock<File>,
    /// Positions of a folder. Locked while it is listed, as that moves the descriptor's position.
    pub positions: Mutex<Positions>,
    _slot: Slot,
}

/// Room for one handle. Taken before anything is created or truncated: what fails leaves nothing behind.
#[derive(Debug)]
pub struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// All of them, by the number the guest was told.
#[derive(Debug)]
pub struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    /// Slots that are not taken.
    free: Arc<AtomicUsize>,
    last: AtomicU64,
    positions: Total,
}

impl Handles {
    /// None, and at most so many.
    pub fn new(most: usize) -> Self {
        let (open, positions) = (RwLock::default(), Total::default());
        let free = Arc::new(AtomicUsize::new(most));
        Self { open, free, last: AtomicU64::new(0), positions }
    }

    /// Takes the slot of a handle that is to come; `ENFILE` if there is none.
    pub fn reserve(&self) -> io::Result<Slot> {
        let less = |free: usize| free.checked_sub(1);
        match self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            Ok(_) => Ok(Slot(Arc::clone(&self.free))),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ENFILE)),
        }
    }

    /// A handle, not added yet, of a file that the acting user has opened with `flags`.
    pub fn of(&self, slot: Slot, file: File, flags: libc::c_int) -> Handle {
        Handle {
            file: Arc::new(file),
            opener: User::acting(),
            flags,
            appending: OnceLock::new(),
            positions: Mutex::new(Positions::new(&self.positions)),
            _slot: slot,
        }
    }

    /// Adds a handle; its number.
    pub fn insert(&self, handle: Handle) -> u64 {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        open.insert(number, Arc::new(handle));
        number
    }

    /// The handle of that number, which is the guest's word.
    pub fn get(&self, number: u64) -> io::Result<Arc<Handle>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&number).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes it, when the last request on it is done.
    pub fn remove(&self, number: u64) -> io::Result<()> {
        let handle = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
        handle.map(drop).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes all.
    pub fn clear(&self) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Handle {
    /// The file for one read or write at an offset, for which fuse-backend-rs wants it by value.
    pub fn borrowed(&self) -> BorrowedFile<'_> {
        BorrowedFile::of(&self.file)
    }

    /// Whether the file is append-only on the host, so that every write goes to its end.
    pub fn append_only(&self) -> bool {
        self.flags & libc::O_APPEND != 0
    }

    /// The same file opened for appending; `descriptors` is `/proc/self/fd`.
    ///
    /// Not `RWF_APPEND`, which overlayfs drops on its way to the file below (seen with Linux 6.1).
    pub fn appending(&self, descriptors: impl AsFd) -> io::Result<&File> {
        if self.append_only() {
            return Ok(&self.file);
        }
        if let Some(file) = self.appending.get() {
            return Ok(file);
        }
        let name = descriptor_name(&self.file);
        let flags = self.flags & (libc::O_SYNC | libc::O_DSYNC | libc::O_NONBLOCK);
        let flags = flags | libc::O_WRONLY | libc::O_APPEND;
        let file = permitted(|| open(&descriptors, &name, flags, 0))?;
        Ok(self.appending.get_or_init(|| file))
    }
}

/// A file that is read and written at offsets only, and so may be shared.
pub struct BorrowedFile<'a>(&'a File);

impl<'a> BorrowedFile<'a> {
    /// Of an open file.
    pub fn of(file: &'a File) -> Self {
        Self(file)
    }

    /// The parts of message memory as the kernel takes them; at most as many as it takes at once.
    fn vectors(slices: &[FileVolatileSlice<'_>]) -> Vec<libc::iovec> {
        slices
            .iter()
            .take(libc::UIO_MAXIOV as usize)
            .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() })
            .collect()
    }
}

impl FileReadWriteVolatile for BorrowedFile<'_> {
    fn read_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_volatile(&mut self, _: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, at: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], at)
    }

    fn read_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        at: u64,
    ) -> io::Result<usize> {
        let vectors = Self::vectors(slices);
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
        // SAFETY: each vector is a part of message memory that is ours to write to.
        let done = check_length(unsafe {
            libc::preadv64(self.0.as_raw_fd(), vectors.as_ptr(), count, at.cast_signed())
        });
        // A file that the kernel makes may have no positions.
        without_position(done, || {
            // SAFETY: as above.
            check_length(unsafe { libc::readv(self.0.as_raw_fd(), vectors.as_ptr(), count) })
        })
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice<'_>, at: u64) -> io::Result<usize> {
        self.write_vectored_at_volatile(&[slice], at)
    }

    fn write_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        at: u64,
    ) -> io::Result<usize> {
        let vectors = Self::vectors(slices);
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
        // SAFETY: each vector is a readable part of message memory.
        let done = check_length(unsafe {
            libc::pwritev64(self.0.as_raw_fd(), vectors.as_ptr(), count, at.cast_signed())
        });
        without_position(done, || {
            // SAFETY: as above.
            check_length(unsafe { libc::writev(self.0.as_raw_fd(), vectors.as_ptr(), count) })
        })
    }
}

/// Gives the result of `again` if the file has no positions.
fn without_position(
    done: io::Result<usize>,
    again: impl FnOnce() -> io::Result<usize>,
) -> io::Result<usize> {
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ESPIPE) => again(),
        done => done,
    }
}
