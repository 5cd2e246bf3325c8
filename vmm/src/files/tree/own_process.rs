//! This process in a procfs of the host's that is a volume, or part of one.
//!
//! `self` leads to the process that asks, and on the host that is the file server. Through its folder
//! a guest could read and write the server's memory, so nothing of it is shown.

use std::fs::File;
use std::io::{self, Read};

use super::system::{open, read_link_at};

/// Bytes of `/proc/PID/status` that are read for the line `Tgid:`.
const STATUS: u64 = 4096;

/// The number of this process in the procfs at `root`, by its link `self`.
pub fn number_in(root: &File) -> Option<u32> {
    let link = open(root, c"self", libc::O_PATH | libc::O_NOFOLLOW, 0).ok()?;
    std::str::from_utf8(&read_link_at(&link).ok()?).ok()?.parse().ok()
}

/// Refuses what is in the folder `parent`, if it is that of this process, whose number is `own`, or of
/// one of its threads.
pub fn admit(own: u32, parent: &File) -> io::Result<()> {
    if process_of(parent) == Some(own) {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    Ok(())
}

/// The process whose folder, or whose thread's folder, `path` is.
fn process_of(path: &File) -> Option<u32> {
    let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = open(path, c"status", flags, 0).ok()?;
    let mut text = Vec::new();
    file.take(STATUS).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}
