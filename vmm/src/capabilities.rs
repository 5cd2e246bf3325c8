//! The capabilities of the calling thread, whole.

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// Of this thread.
const OWN: Header = Header { version: VERSION, pid: 0 };

/// Bit masks for 32 capabilities.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sets {
    pub(crate) effective: u32,
    pub(crate) permitted: u32,
    pub(crate) inheritable: u32,
}

/// What the thread has: the first 32, then the others.
pub(crate) fn get() -> io::Result<[Sets; 2]> {
    let (mut header, mut sets) = (OWN, [Sets::default(); 2]);
    // SAFETY: this version fills two sets, which `sets` has room for.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(sets) }
}

/// Has the thread have these from now on, and no others.
pub(crate) fn set(sets: &[Sets; 2]) -> io::Result<()> {
    let mut header = OWN;
    // SAFETY: this version reads two sets.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
