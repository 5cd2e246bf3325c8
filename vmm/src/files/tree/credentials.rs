//! In whose name a thread acts.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::system::check;
use crate::capabilities;

const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
const CAP_FSETID: u32 = 4;

thread_local! {
    /// Whether this thread is prepared, and so may take other file system ids.
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread a working directory (`descriptors`) and umask of its own, and lets it keep its
/// capabilities when it changes its file system ids.
pub fn prepare(descriptors: &File) -> io::Result<()> {
    if PREPARED.get() {
        return Ok(());
    }
    // SAFETY: these calls take and give plain numbers.
    unsafe {
        check(libc::unshare(libc::CLONE_FS))?;
        check(libc::fchdir(descriptors.as_raw_fd()))?;
        libc::umask(0);
        if libc::geteuid() == 0 {
            // In the jail it is set, and the right to set it is gone.
            let bits = check(libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0))?;
            if libc::c_ulong::from(bits.unsigned_abs()) & SECBIT_NO_SETUID_FIXUP == 0 {
                check(libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0))?;
            }
            // setfsuid has no way to say that it failed, but to ask for the value afterwards.
            libc::setfsuid(1);
            libc::setfsgid(1);
            if libc::setfsuid(0) != 1 || libc::setfsgid(0) != 1 {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
    }
    PREPARED.set(true);
    Ok(())
}

/// Does `body` in the name of that user, so that what it creates is the user's.
pub fn as_user<T>(uid: u32, gid: u32, umask: u32, body: impl FnOnce() -> T) -> T {
    // SAFETY: these calls take and give plain numbers, and are the thread's own: glibc does not spread
    // setfsuid and setfsgid to other threads, and `prepare` has unshared the umask.
    unsafe {
        libc::umask(umask & 0o777);
        // The group first and last: only root may change it.
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        let result = body();
        libc::setfsuid(0);
        libc::setfsgid(0);
        result
    }
}

/// Does `body` without the right to leave set-user-id and set-group-id bits of changed files as they
/// are, if `drop` says so: the kernel then takes them away as for any user (`FUSE_HANDLE_KILLPRIV_V2`).
pub fn without_fsetid<T>(drop: bool, body: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !drop {
        return body();
    }
    let before = capabilities::get()?;
    let mut less = before;
    less[0].effective &= !(1 << CAP_FSETID);
    capabilities::set(&less)?;
    let result = body();
    capabilities::set(&before)?;
    result
}
