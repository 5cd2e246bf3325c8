//! System calls, with the step they are for.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use super::JailError;

/// The result of a raw system call, as a step of the jail.
pub(super) fn check(step: &'static str, result: libc::c_long) -> Result<libc::c_long, JailError> {
    if result < 0 {
        return Err(JailError::Step { step, source: io::Error::last_os_error() });
    }
    Ok(result)
}

/// The result of a call that gives nothing but success.
pub(super) fn plain(step: &'static str, result: libc::c_int) -> Result<(), JailError> {
    check(step, result.into()).map(drop)
}

/// The descriptor that a raw system call has just opened.
pub(super) fn opened(step: &'static str, result: libc::c_long) -> Result<File, JailError> {
    let number = check(step, result)?;
    let number = libc::c_int::try_from(number)
        .map_err(|_| JailError::Step { step, source: io::ErrorKind::InvalidData.into() })?;
    // SAFETY: the kernel has just opened it for this call, so nobody else owns it.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// This process's id where the root comes from: unlike `getpid`, of which there are as many as PID
/// namespaces.
pub(super) fn process_id() -> Result<u32, JailError> {
    let link = std::fs::read_link("/proc/self");
    let number = link.as_ref().ok().and_then(|path| path.to_str()?.parse().ok());
    number.ok_or_else(|| JailError::Step {
        step: "read its process id in /proc",
        source: link.err().unwrap_or_else(|| io::ErrorKind::InvalidData.into()),
    })
}

/// Leaves the namespaces that `flags` names for new ones.
pub(super) fn unshare(flags: libc::c_int) -> Result<(), JailError> {
    // SAFETY: plain numbers.
    plain("make namespaces", unsafe { libc::unshare(flags) })
}

/// Sets a resource's limit, for ever.
pub(super) fn limit(resource: libc::__rlimit_resource_t, most: u64) -> Result<(), JailError> {
    let wanted = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: `wanted` is only read.
    plain("limit a resource", unsafe { libc::setrlimit(resource, &wanted) })
}

/// Each file that the guest remembers holds a descriptor, so as many as the system allows. Later there
/// is neither the right to raise the limit nor the place to read the system's.
pub(super) fn raise_descriptor_limit() -> Result<(), JailError> {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    // Without the right to raise it, or the number, what there is must do.
    most.map_or(Ok(()), |most| limit(libc::RLIMIT_NOFILE, most).or(Ok(())))
}

/// Leaves the keys of the session that it was started from for a keyring with nothing in it.
pub(super) fn leave_keys() -> Result<(), JailError> {
    const JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: plain numbers, the second of which stands for a keyring without a name.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0_usize) };
    match check("leave the session's keys", result) {
        // No keys, or a filter round the host's services that keeps all from them.
        Err(JailError::Step { source, .. })
            if matches!(source.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) =>
        {
            Ok(())
        }
        result => result.map(drop),
    }
}

/// Forgets the environment, and wipes its texts: to take the list away leaves them on the stack, for
/// whoever takes over the process to read.
pub(super) fn empty_environment() -> Result<(), JailError> {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: there is one thread, so nobody reads the environment meanwhile. The list ends with null;
    // its texts are terminated, and where exec or `setenv` has put them they may be written to.
    unsafe {
        let mut next = environ;
        while !next.is_null() && !(*next).is_null() {
            std::ptr::write_bytes(*next, 0, libc::strlen(*next));
            next = next.add(1);
        }
        plain("empty the environment", libc::clearenv())
    }
}
