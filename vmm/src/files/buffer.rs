//! Message buffers that cost memory only as far as they are written.

use std::io;
use std::ops::{Deref, DerefMut};

/// A zeroed anonymous mapping.
///
/// The largest message is over 1 MiB, most have less than 1 KiB: pages come in when they are first
/// written, and [`Buffer::release`] gives them back. (A `Vec` would not do: the allocator may serve it
/// from memory already in use and clear all of it.)
pub struct Buffer {
    address: *mut u8,
    length: usize,
}

// SAFETY: the mapping is owned by this value alone, like a `Box<[u8]>`.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Maps `length` bytes.
    pub fn new(length: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), length })
    }

    /// Gives all pages back; the buffer reads as zeroes again.
    pub fn release(&mut self) {
        // SAFETY: the range is our own private anonymous mapping, and `&mut self` proves that nobody
        // refers into it. A failure leaves the pages where they are, which is only a cost.
        unsafe { libc::madvise(self.address.cast(), self.length, libc::MADV_DONTNEED) };
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `length` bytes long, initialised (zeroed) and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the reference the only one.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and is not used any more.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_zeroes_after_release() {
        let mut buffer = Buffer::new(1 << 20).unwrap();
        buffer[1000..2000].fill(7);
        assert_eq!(buffer[1500], 7);
        buffer.release();
        assert!(buffer.iter().all(|byte| *byte == 0));
    }
}
