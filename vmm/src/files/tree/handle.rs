//! The files and folders that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::credentials::{User, permitted};
use super::system::{check_length, descriptor_name, open};

/// An open file or folder.
#[derive(Debug)]
pub struct Handle {
    /// Opened with the rights the guest asked for, but never appending.
    pub file: Arc<File>,
    /// The user who opened it, in whose name it is read and written.
    pub opener: User,
    /// The same file opened for appending, from the first such write on.
    appending: OnceLock<File>,
    /// Held while a folder is listed, as that moves the descriptor's position.
    pub position: Mutex<()>,
}

/// All of them, by the number the guest was told.
#[derive(Debug)]
pub struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    most: usize,
    last: AtomicU64,
}

impl Handles {
    /// None, and at most so many (`ENFILE`).
    pub fn new(most: usize) -> Self {
        Self { open: RwLock::default(), most, last: AtomicU64::new(0) }
    }

    /// Adds an open file; its number.
    pub fn insert(&self, file: File, opener: User) -> io::Result<(u64, Arc<File>)> {
        let file = Arc::new(file);
        let handle = Arc::new(Handle {
            file: Arc::clone(&file),
            opener,
            appending: OnceLock::new(),
            position: Mutex::new(()),
        });
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= self.most {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        open.insert(number, handle);
        Ok((number, file))
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

    /// The same file opened for appending; `descriptors` is `/proc/self/fd`.
    ///
    /// Not `RWF_APPEND`, which overlayfs drops on its way to the file below (seen with Linux 6.1).
    pub fn appending(&self, descriptors: impl AsFd) -> io::Result<&File> {
        if let Some(file) = self.appending.get() {
            return Ok(file);
        }
        let name = descriptor_name(&self.file);
        let file = permitted(|| open(&descriptors, &name, libc::O_WRONLY | libc::O_APPEND, 0))?;
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
        check_length(unsafe {
            libc::preadv64(self.0.as_raw_fd(), vectors.as_ptr(), count, at.cast_signed())
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
        check_length(unsafe {
            libc::pwritev64(self.0.as_raw_fd(), vectors.as_ptr(), count, at.cast_signed())
        })
    }
}
