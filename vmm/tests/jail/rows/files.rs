//! Files of the host.

use std::ffi::CStr;
use std::os::fd::AsRawFd;

use libc::{EACCES, EBADF, EINVAL, ENOENT, EOPNOTSUPP, EPERM, EROFS, c_long};

use crate::host::Host;
use crate::role::{End, FOLDER, Row, Walls, call};

const HERE: u64 = libc::AT_FDCWD as u64;
const READ: u64 = libc::O_RDONLY as u64;
const PATH: u64 = libc::O_PATH as u64;

/// `open` and its like are on no list of the machine's; the file server opens, but its root is the shared
/// folder.
const OPENS: (Walls, Walls) = (
    (End::Refused(&[ENOENT]), End::Named("openat")),
    (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
);

fn open(path: &CStr) -> c_long {
    open_at(HERE, path, READ)
}

fn open_at(folder: u64, path: &CStr, flags: u64) -> c_long {
    call(libc::SYS_openat, [folder, path.as_ptr() as u64, flags, 0o600])
}

/// Opens `..` and then, from there, the secret.
fn in_two_steps(folder: u64) -> c_long {
    let up = open_at(folder, c"..", PATH);
    if up < 0 { up } else { open_at(up.cast_unsigned(), c"secret", READ) }
}

fn descriptors(host: &Host) -> u64 {
    // The machine has none: as if it had, by a number that is not open.
    host.descriptors.as_ref().map_or(99, |file| u64::from(file.as_raw_fd().unsigned_abs()))
}

/// Of the file's own handle, made to name another inode; -1 if there are no handles here.
fn by_handle(inode: u32) -> c_long {
    // struct file_handle with room for 128 bytes; then a mount's number.
    let (mut handle, mut mount) = ([0_u32; 34], 0_u64);
    handle[0] = 128;
    let at = handle.as_mut_ptr();
    let name = c"own".as_ptr() as u64;
    let folder = u64::from(FOLDER.unsigned_abs());
    let named =
        call(libc::SYS_name_to_handle_at, [folder, name, at as u64, (&raw mut mount) as u64, 0]);
    if named < 0 {
        return named;
    }
    if inode != 0 {
        (handle[2], handle[3]) = (inode, 0);
    }
    let at = handle.as_mut_ptr();
    call(libc::SYS_open_by_handle_at, [folder, at as u64, READ])
}

pub const ROWS: &[Row] = &[
    Row::each("open /etc/passwd", OPENS.0, OPENS.1, |_| open(c"/etc/passwd")),
    Row::each("open a file of the host", OPENS.0, OPENS.1, |host| open(&host.secret)),
    Row::each("open /proc/1/root", OPENS.0, OPENS.1, |_| open(c"/proc/1/root/etc/passwd")),
    Row::each("open /proc/self/mem", OPENS.0, OPENS.1, |_| open(c"/proc/self/mem")),
    Row::each("open /dev/mem", OPENS.0, OPENS.1, |_| open(c"/dev/mem")),
    Row::each("open /dev/kvm", OPENS.0, OPENS.1, |_| open(c"/dev/kvm")),
    Row::each("open another's descriptor in /proc", OPENS.0, OPENS.1, |host| {
        let path = std::ffi::CString::new(format!("/proc/{}/fd/0", host.victim())).unwrap();
        open(&path)
    }),
    Row::each("open above the root", OPENS.0, OPENS.1, |_| open(c"../../../etc/passwd")),
    Row::both("openat2", (End::Refused(&[ENOENT]), End::Named("openat2")), |_| {
        let how = [0_u64; 3];
        let path = c"/etc/passwd".as_ptr() as u64;
        call(libc::SYS_openat2, [HERE, path, how.as_ptr() as u64, 24])
    }),
    // To the machine a folder is none of its own: Landlock alone stands there.
    Row::each(
        "a folder left open: `..`",
        (End::Refused(&[EACCES]), End::Named("openat")),
        (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
        |_| open_at(0, c"../secret", READ),
    ),
    Row::each(
        "a folder left open: `..` by O_PATH",
        (End::Refused(&[EACCES]), End::Named("openat")),
        (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
        |_| in_two_steps(0),
    ),
    Row::each(
        "a folder left open: a new file",
        (End::Refused(&[EACCES]), End::Named("openat")),
        // In its own folder it may.
        (End::FilterOnly, End::FilterOnly),
        |_| open_at(0, c"new", (libc::O_CREAT | libc::O_WRONLY).unsigned_abs().into()),
    ),
    Row::each(
        "write to the root",
        (End::Refused(&[EACCES, EROFS]), End::Named("mkdir")),
        (End::FilterOnly, End::Named("mkdir")),
        |_| call(libc::SYS_mkdir, [c"/made".as_ptr() as u64, 0o700]),
    ),
    Row::each(
        "a device node",
        (End::Refused(&[EACCES, EPERM, EROFS]), End::Named("mknodat")),
        // Its guest may make nodes; the server opens none of them.
        (End::FilterOnly, End::FilterOnly),
        |_| {
            let mode = (libc::S_IFCHR | 0o600).into();
            call(libc::SYS_mknodat, [HERE, c"/node".as_ptr() as u64, mode, 0x0103])
        },
    ),
    Row::both(
        "open by handle",
        (End::Refused(&[EPERM, EOPNOTSUPP]), End::Named("name_to_handle_at")),
        |_| by_handle(0),
    ),
    Row::both(
        "open the file system's root by a forged handle",
        (End::Refused(&[EPERM, EOPNOTSUPP]), End::Named("name_to_handle_at")),
        |_| by_handle(2),
    ),
    Row::both(
        "open_by_handle_at",
        (End::Refused(&[EPERM, EINVAL]), End::Named("open_by_handle_at")),
        |_| {
            let handle = [8_u32, 1, 2, 0];
            call(libc::SYS_open_by_handle_at, [0, handle.as_ptr() as u64, READ])
        },
    ),
    Row::both(
        "watch the host's files",
        (End::Refused(&[EPERM]), End::Named("fanotify_init")),
        // FAN_UNLIMITED_QUEUE, which takes a right; without, it could mark what it may open.
        |_| call(libc::SYS_fanotify_init, [0x10, 0]),
    ),
];

/// By its own descriptors' links in /proc, which show them to nobody else.
pub const OWN: &[Row] = &[
    Row::each(
        "the kernel's settings, from its own descriptors",
        (End::Refused(&[EBADF]), End::Named("openat")),
        (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
        |host| open_at(descriptors(host), c"../../sys/kernel/core_pattern", READ),
    ),
    Row::each(
        "another process, from its own descriptors",
        (End::Refused(&[EBADF]), End::Named("openat")),
        (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
        |host| open_at(descriptors(host), c"../../1/root/etc/passwd", READ),
    ),
    Row::each(
        "`..` behind the link to its folder's descriptor",
        (End::Refused(&[EBADF]), End::Named("openat")),
        (End::Refused(&[ENOENT]), End::Refused(&[ENOENT])),
        |host| open_at(descriptors(host), c"0/../secret", READ),
    ),
    Row::each(
        "a program left open, to be written to by its link",
        (End::Refused(&[EBADF]), End::Named("openat")),
        (End::Refused(&[EACCES]), End::Refused(&[EACCES])),
        |host| open_at(descriptors(host), c"1", libc::O_RDWR.unsigned_abs().into()),
    ),
    Row::each(
        "a hard link to a program left open",
        (End::Refused(&[EACCES, ENOENT, EPERM, EROFS]), End::Named("linkat")),
        (End::Refused(&[EACCES, libc::EXDEV]), End::Refused(&[EACCES, libc::EXDEV])),
        |host| {
            let (from, to) = (c"1".as_ptr() as u64, c"/linked".as_ptr() as u64);
            let follow = libc::AT_SYMLINK_FOLLOW.unsigned_abs().into();
            match host.descriptors {
                Some(_) => call(libc::SYS_linkat, [descriptors(host), from, HERE, to, follow]),
                None => {
                    let empty = (c"".as_ptr() as u64, libc::AT_EMPTY_PATH.unsigned_abs());
                    call(libc::SYS_linkat, [1, empty.0, HERE, to, empty.1.into()])
                }
            }
        },
    ),
];
