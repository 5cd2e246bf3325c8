//! System calls, each with the one shape used here.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

/// The result of a call that gives -1 on failure.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The result of a call that gives a length, or -1 on failure.
pub fn check_length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Opens `name` in `folder`, which `flags` must keep from following links and from blocking.
pub fn open(folder: impl AsFd, name: &CStr, flags: libc::c_int, mode: u32) -> io::Result<File> {
    let folder = folder.as_fd().as_raw_fd();
    // SAFETY: `name` is terminated and outlives the call.
    let descriptor =
        check(unsafe { libc::openat(folder, name.as_ptr(), flags | libc::O_CLOEXEC, mode) })?;
    // SAFETY: just opened, so nobody else owns it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// An `O_PATH` descriptor of `name` in `folder`, itself if it is a link.
pub fn open_path(folder: impl AsFd, name: &CStr) -> io::Result<File> {
    open(folder, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
}

/// The name of a descriptor relative to `/proc/self/fd`, the working directory of serving threads.
pub fn descriptor_name(descriptor: &File) -> CString {
    // Digits hold no NUL.
    CString::new(descriptor.as_raw_fd().to_string()).unwrap_or_default()
}

/// Returns how many descriptors the process may have.
pub fn descriptor_limit() -> io::Result<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is written to, and is ours.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    Ok(usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

/// The target of the link `name` in the working directory of serving threads.
pub fn read_link(name: &CStr) -> io::Result<Vec<u8>> {
    read_link_of(libc::AT_FDCWD, name)
}

/// The target of the link behind `link` (`O_PATH`).
pub fn read_link_at(link: &File) -> io::Result<Vec<u8>> {
    read_link_of(link.as_raw_fd(), c"")
}

fn read_link_of(folder: libc::c_int, name: &CStr) -> io::Result<Vec<u8>> {
    let mut target = vec![0; libc::PATH_MAX as usize];
    // SAFETY: the name is terminated; `target` has the room it says.
    let count = check_length(unsafe {
        libc::readlinkat(folder, name.as_ptr(), target.as_mut_ptr().cast(), target.len())
    })?;
    target.truncate(count);
    Ok(target)
}

/// What statx(2) says.
#[derive(Clone, Copy)]
pub struct Status {
    /// The mount it was reached through.
    pub mount: u64,
    /// The device of its file system.
    pub device: u64,
    pub(super) raw: libc::statx,
}

impl Status {
    /// Of the file behind `file`, itself if it is a link.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut raw = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the name is terminated, and `raw` has room for one result.
        check(unsafe {
            libc::statx(
                file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW,
                libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID,
                raw.as_mut_ptr(),
            )
        })?;
        // SAFETY: zeroed is a valid value, and the kernel has written over it.
        let raw = unsafe { raw.assume_init() };
        let device = libc::makedev(raw.stx_dev_major, raw.stx_dev_minor);
        Ok(Self { mount: raw.stx_mnt_id, device, raw })
    }

    /// Type and permissions.
    pub fn mode(&self) -> u32 {
        u32::from(self.raw.stx_mode)
    }

    /// Number within its file system.
    pub fn inode(&self) -> u64 {
        self.raw.stx_ino
    }

    /// The same with another number within the file system.
    pub fn numbered(mut self, inode: u64) -> Self {
        self.raw.stx_ino = inode;
        self
    }

    /// Number of names.
    pub fn links(&self) -> u32 {
        self.raw.stx_nlink
    }

    /// Time of birth; zeroes if the file system keeps none.
    pub fn born(&self) -> (i64, u32) {
        if self.raw.stx_mask & libc::STATX_BTIME == 0 {
            return (0, 0);
        }
        (self.raw.stx_btime.tv_sec, self.raw.stx_btime.tv_nsec)
    }

    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        self.mode() & libc::S_IFMT == libc::S_IFDIR
    }
}

impl From<Status> for libc::stat64 {
    fn from(Status { raw, device, .. }: Status) -> Self {
        // SAFETY: numbers and padding only, for which zeroes are valid.
        let mut stat: Self = unsafe { MaybeUninit::zeroed().assume_init() };
        stat.st_dev = device;
        stat.st_ino = raw.stx_ino;
        stat.st_mode = u32::from(raw.stx_mode);
        stat.st_nlink = u64::from(raw.stx_nlink);
        stat.st_uid = raw.stx_uid;
        stat.st_gid = raw.stx_gid;
        stat.st_rdev = libc::makedev(raw.stx_rdev_major, raw.stx_rdev_minor);
        // Sizes and blocks are below 2^63 on every file system.
        stat.st_size = raw.stx_size.cast_signed();
        stat.st_blksize = i64::from(raw.stx_blksize);
        stat.st_blocks = raw.stx_blocks.cast_signed();
        stat.st_atime = raw.stx_atime.tv_sec;
        stat.st_atime_nsec = i64::from(raw.stx_atime.tv_nsec);
        stat.st_mtime = raw.stx_mtime.tv_sec;
        stat.st_mtime_nsec = i64::from(raw.stx_mtime.tv_nsec);
        stat.st_ctime = raw.stx_ctime.tv_sec;
        stat.st_ctime_nsec = i64::from(raw.stx_ctime.tv_nsec);
        stat
    }
}
