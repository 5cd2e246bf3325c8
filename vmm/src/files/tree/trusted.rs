//! Attributes of the guest's `trusted.` namespace.
//!
//! On the host only a process with `CAP_SYS_ADMIN` has these, which the file server does not. They are
//! kept as `user.husk.trusted.NAME`. That name itself is hidden from the guest: its kernel asks for
//! `CAP_SYS_ADMIN` by the prefix `trusted.`, which nobody is to go round.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;

const GUEST: &[u8] = b"trusted.";
const HOST: &[u8] = b"user.husk.trusted.";

/// Returns the host's name of the attribute that the guest calls `name`. `hidden` is the error for a
/// name that the guest cannot use.
pub fn host_name(name: &CStr, hidden: libc::c_int) -> io::Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if bytes.starts_with(HOST) {
        return Err(io::Error::from_raw_os_error(hidden));
    }
    let Some(rest) = bytes.strip_prefix(GUEST) else { return Ok(Cow::Borrowed(name)) };
    // No NUL is in either part.
    let name = CString::new([HOST, rest].concat()).map_err(io::Error::other)?;
    Ok(Cow::Owned(name))
}

/// Returns the guest's names for a list of the host's, each ended by NUL. Names of the `trusted.`
/// namespace are there only if `trusted` says so.
pub fn guest_names(host: &[u8], trusted: bool) -> Vec<u8> {
    let mut names = Vec::with_capacity(host.len());
    for name in host.split_inclusive(|byte| *byte == 0) {
        match name.strip_prefix(HOST) {
            Some(_) if !trusted => {}
            Some(rest) => {
                names.extend_from_slice(GUEST);
                names.extend_from_slice(rest);
            }
            // The host's own, which the server could not read.
            None if name.starts_with(GUEST) => {}
            None => names.extend_from_slice(name),
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped_and_the_mapped_prefix_is_hidden() {
        let host = |name| host_name(name, libc::EPERM);
        assert_eq!(&*host(c"user.colour").unwrap(), c"user.colour");
        assert_eq!(&*host(c"trusted.overlay.opaque").unwrap(), c"user.husk.trusted.overlay.opaque");
        let error = host(c"user.husk.trusted.overlay.opaque").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let listed = b"user.a\0user.husk.trusted.b\0trusted.c\0security.d\0";
        assert_eq!(guest_names(listed, true), b"user.a\0trusted.b\0security.d\0");
        assert_eq!(guest_names(listed, false), b"user.a\0security.d\0");
        assert_eq!(guest_names(b"", true), b"");
    }
}
