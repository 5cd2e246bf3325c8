//! In whose name a thread acts.
//!
//! Each request is carried out with the file system ids of the process that asks, so that the host's
//! file system judges the right one: quotas, reserved blocks, NFS with root_squash. The capabilities
//! stay, as the permission checks are the guest kernel's.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::system::check;
use crate::capabilities;

const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
const CAP_FSETID: u32 = 4;

/// Stands for ids that do not exist (`/proc/sys/kernel/overflowuid`): -1 would change nothing.
const NOBODY: u32 = 65534;

thread_local! {
    /// Whether this thread is prepared, and so may take other file system ids.
    static PREPARED: Cell<bool> = const { Cell::new(false) };
    /// The thread's file system ids.
    static ACTING: Cell<User> = const { Cell::new(User::ROOT) };
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
}

impl User {
    /// The host's root.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };

    /// The user of a request: any number is the guest's word.
    pub fn new(uid: u32, gid: u32) -> Self {
        let known = |id| if id == u32::MAX { NOBODY } else { id };
        Self { uid: known(uid), gid: known(gid) }
    }

    /// Returns the user in whose name the thread acts.
    pub fn acting() -> Self {
        ACTING.get()
    }

    /// Has the calling thread act in the name of this user from now on.
    pub fn act(self) {
        let before = ACTING.replace(self);
        // SAFETY: these calls take and give plain numbers, and are the thread's own: glibc does not
        // spread them to other threads.
        unsafe {
            if before.gid != self.gid {
                libc::setfsgid(self.gid);
            }
            if before.uid != self.uid {
                libc::setfsuid(self.uid);
            }
        }
    }
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

/// Does `body` with that umask, which counts where there is no default ACL.
pub fn with_umask<T>(umask: u32, body: impl FnOnce() -> T) -> T {
    // SAFETY: plain numbers; `prepare` has unshared the umask.
    unsafe { libc::umask(umask & 0o777) };
    body()
}

/// Does `call`, which creates nothing, in the name of the acting user; once more as root if that user
/// may not, as a request does not name the user's supplementary groups. The guest's kernel has judged
/// the user before.
pub fn permitted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let result = call();
    match &result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {}
        _ => return result,
    }
    let user = User::acting();
    if user == User::ROOT {
        return result;
    }
    User::ROOT.act();
    let result = call();
    user.act();
    result
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
