//! Extended attributes, ACLs among them.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};

use super::Tree;
use super::credentials::permitted;
use super::system::{check, check_length, descriptor_name};
use super::table::ROOT;
use super::trusted::{guest_names, host_name};

/// No attribute, and no list of them, is longer (`XATTR_SIZE_MAX`).
const LONGEST: u32 = 64 * 1024;

/// Returns a value of the server's own, or its length if the guest has no room yet.
fn answer(value: Vec<u8>, size: u32) -> io::Result<GetxattrReply> {
    let length = u32::try_from(value.len()).unwrap_or(LONGEST);
    match size {
        0 => Ok(GetxattrReply::Count(length)),
        _ if size < length => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        _ => Ok(GetxattrReply::Value(value)),
    }
}

/// What the names of ACLs begin with.
const ACLS: &[u8] = b"system.posix_acl_";

// The calls follow the link in /proc to the node itself: those that take a descriptor do not take
// `O_PATH` ones.
impl Tree {
    pub(super) fn set_extended(
        &self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let name = host_name(name, libc::EPERM)?;
        let node = self.node(node)?;
        let path = descriptor_name(&node.file);
        permitted(|| {
            // SAFETY: both texts are terminated, and the value goes with its length.
            check(unsafe {
                libc::setxattr(
                    path.as_ptr(),
                    name.as_ptr(),
                    value.as_ptr().cast(),
                    value.len(),
                    flags.cast_signed(),
                )
            })
        })?;
        self.attributes(node.number).map(drop)
    }

    pub(super) fn get_extended(
        &self,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        if let Some(value) = self.validity.asked(name).filter(|_| node == ROOT) {
            return answer(value.to_vec(), size);
        }
        let name = host_name(name, libc::ENODATA)?;
        let node = self.node(node)?;
        let path = descriptor_name(&node.file);
        let mut value = vec![0_u8; size.min(LONGEST) as usize];
        let count = permitted(|| {
            // SAFETY: both texts are terminated, and `value` has the room it says.
            check_length(unsafe {
                libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
            })
        });
        let count = count.map_err(|error| match error.raw_os_error() {
            // On a file system without ACLs no file has one. The guest's kernel would take the error
            // for the answer to its permission check.
            Some(libc::EOPNOTSUPP) if name.to_bytes().starts_with(ACLS) => {
                io::Error::from_raw_os_error(libc::ENODATA)
            }
            _ => error,
        })?;
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(count).unwrap_or(LONGEST)));
        }
        value.truncate(count);
        Ok(GetxattrReply::Value(value))
    }

    /// The names of attributes, those of the `trusted.` namespace only if `trusted` says so.
    pub(super) fn list_extended(
        &self,
        node: u64,
        size: u32,
        trusted: bool,
    ) -> io::Result<ListxattrReply> {
        let node = self.node(node)?;
        let path = descriptor_name(&node.file);
        // Whole, as the guest's names are not as long as the host's.
        let mut names = vec![0_u8; LONGEST as usize];
        // SAFETY: the path is terminated, and `names` has the room it says.
        let count = check_length(unsafe {
            libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len())
        })?;
        names.truncate(count);
        let names = guest_names(&names, trusted);
        if size == 0 {
            return Ok(ListxattrReply::Count(u32::try_from(names.len()).unwrap_or(LONGEST)));
        }
        if names.len() > size as usize {
            return Err(io::Error::from_raw_os_error(libc::ERANGE));
        }
        Ok(ListxattrReply::Names(names))
    }

    pub(super) fn remove_extended(&self, node: u64, name: &CStr) -> io::Result<()> {
        let name = host_name(name, libc::EPERM)?;
        let node = self.node(node)?;
        let path = descriptor_name(&node.file);
        permitted(|| {
            // SAFETY: both texts are terminated.
            check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
        })?;
        self.attributes(node.number).map(drop)
    }
}
