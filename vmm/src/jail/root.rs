//! The root of the jail: an empty file system in place of the host's.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsRawFd;

use super::JailError;
use super::system::{check, opened, plain};

/// `fsconfig(2)`: set an option to a text; make the file system.
const SET_STRING: libc::c_uint = 1;
const CREATE: libc::c_uint = 6;

/// `fsopen(2)` and `fsmount(2)`: close the descriptor on exec.
const CLOSE_ON_EXEC: libc::c_uint = 1;

/// `fsmount(2)`: read-only, no set-user-id, no devices, no programs.
const CLOSED: libc::c_uint = 1 | 2 | 4 | 8;

/// `move_mount(2)`: what is moved is the descriptor itself.
const FROM_DESCRIPTOR: libc::c_uint = 4;

/// Leaves the host's mounts for an empty root. The caller has a mount namespace of its own.
pub(super) fn leave_for_nothing() -> Result<(), JailError> {
    // Otherwise the mounts taken away below would be taken from the host.
    // SAFETY: a terminated path, and null where the kernel reads nothing.
    plain("keep mounts to itself", unsafe {
        libc::mount(
            std::ptr::null(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    })?;
    let old =
        File::open("/").map_err(|source| JailError::Step { step: "open the root", source })?;
    let new = mount(c"tmpfs", &[(c"mode", c"0555"), (c"nr_inodes", c"1")])?;
    // SAFETY: terminated paths; the descriptor is open.
    check("attach the empty root", unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            new.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            FROM_DESCRIPTOR,
        )
    })?;
    // SAFETY: a descriptor by number.
    plain("enter the empty root", unsafe { libc::fchdir(new.as_raw_fd()) })?;
    // The old root comes to lie on the new one, from where it is taken with all that hangs on it.
    // SAFETY: terminated paths.
    check("change the root", unsafe {
        libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr())
    })?;
    // SAFETY: a descriptor by number.
    plain("find the old root", unsafe { libc::fchdir(old.as_raw_fd()) })?;
    // SAFETY: a terminated path.
    plain("leave the old root", unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) })?;
    // SAFETY: a terminated path.
    plain("enter the new root", unsafe { libc::chdir(c"/".as_ptr()) })
}

/// `/proc/self/fd` of a /proc that shows this process only and is mounted nowhere, so that the way up
/// from there ends at its own root. The host's would lead to the kernel's settings.
pub(super) fn own_descriptors() -> Result<File, JailError> {
    let proc = mount(c"proc", &[(c"subset", c"pid"), (c"hidepid", c"ptraceable")])?;
    // SAFETY: a terminated path; the descriptor is open.
    opened("open its own descriptors", unsafe {
        libc::syscall(
            libc::SYS_openat,
            proc.as_raw_fd(),
            c"self/fd".as_ptr(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
            0,
        )
    })
}

/// A new file system, mounted nowhere.
fn mount(kind: &CStr, options: &[(&CStr, &CStr)]) -> Result<File, JailError> {
    // SAFETY: a terminated text.
    let context = opened("choose a file system", unsafe {
        libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOSE_ON_EXEC)
    })?;
    let configure =
        |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
            // SAFETY: null, or terminated texts that outlive the call.
            check("configure a file system", unsafe {
                libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0)
            })
        };
    for (key, value) in options {
        configure(SET_STRING, key.as_ptr(), value.as_ptr())?;
    }
    configure(CREATE, std::ptr::null(), std::ptr::null())?;
    // SAFETY: plain numbers.
    opened("mount a file system", unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOSE_ON_EXEC, CLOSED)
    })
}
