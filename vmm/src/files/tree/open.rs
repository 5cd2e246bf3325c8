//! Opening files for their content.

use std::io;

use fuse_backend_rs::api::filesystem::OpenOptions;

use super::Tree;
use super::handle::{Handle, Slot};
use super::node::Node;
use super::system::Status;

/// What of the guest's open flags is passed on always.
///
/// Not `O_APPEND`: the guest's kernel writes cached pages through any open file, to where they belong;
/// appending is asked for by each write. Not `O_DIRECT`: the guest's cache is passed by anyway, and
/// message buffers are not aligned.
const PASSED: libc::c_int = libc::O_ACCMODE
    | libc::O_TRUNC
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK;

/// Returns the flags to open a file with, for a guest that gives `flags`.
pub fn open_flags(flags: u32) -> libc::c_int {
    flags.cast_signed() & PASSED
}

impl Tree {
    /// Opens a node for its content, as the guest asks for by `flags`; the handle and how the guest's
    /// kernel is to treat it.
    pub(super) fn open_content(
        &self,
        slot: Slot,
        node: &Node,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<(Handle, OpenOptions)> {
        let traits = self.mounts.of(node.mount);
        let mut passed = open_flags(flags);
        if traits.may_wait {
            // A read that waits for an event would hold up a thread.
            passed |= libc::O_NONBLOCK;
        }
        let append = flags.cast_signed() & libc::O_APPEND;
        // Append-only files open for appending only; not every file lets its time of access be.
        let mut tries = vec![passed, passed | append];
        if passed & libc::O_NOATIME != 0 {
            tries.extend([passed & !libc::O_NOATIME, passed & !libc::O_NOATIME | append]);
        }
        tries.dedup();
        let mut refused = io::Error::from_raw_os_error(libc::EPERM);
        for tried in tries {
            match self.open_node(node, tried, kill_privileges) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => refused = error,
                opened => {
                    let file = opened?;
                    let handle = self.handles.of(slot, file, tried);
                    let options = if traits.made_on_reading || handle.append_only() {
                        OpenOptions::DIRECT_IO
                    } else {
                        OpenOptions::empty()
                    };
                    return Ok((handle, options));
                }
            }
        }
        Err(refused)
    }

    pub(super) fn open_file(
        &self,
        number: u64,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<(u64, OpenOptions)> {
        let node = self.node(number)?;
        let slot = self.handles.reserve()?;
        let (handle, mut options) = self.open_content(slot, &node, flags, kill_privileges)?;
        // Cached content stays good as long as the times and the size do; else each start of a program
        // would fetch its libraries again.
        if options.is_empty() && self.nodes.keeps_cache(number, &Status::of(&handle.file)?) {
            options |= OpenOptions::KEEP_CACHE;
        }
        Ok((self.opened(&node, handle)?, options))
    }
}
