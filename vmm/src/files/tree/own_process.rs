//! This process in a procfs of the host's that is a volume, or part of one.
//!
//! `self` leads to the process that asks, and on the host that is the file server. Through its folder
//! a guest could read and write the server's memory, so nothing of it is shown but the mounts, as they
//! are beneath the volume: what `df` and `findmnt` need in a volume that is the whole host.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::system::{descriptor_name, open, read_link, read_link_at};

/// Bytes of `/proc/PID/status` that are read for the line `Tgid:`.
const STATUS: u64 = 4096;

/// A table of mounts is not read further than this.
const TABLE: u64 = 4 << 20;

/// Files of the folder that are shown, and the column that has the mount point.
const SHOWN: [(&[u8], usize); 2] = [(b"mountinfo", 4), (b"mounts", 1)];

/// The number of this process in the procfs at `root`, by its link `self`.
pub fn number_in(root: &File) -> Option<u32> {
    let link = open(root, c"self", libc::O_PATH | libc::O_NOFOLLOW, 0).ok()?;
    std::str::from_utf8(&read_link_at(&link).ok()?).ok()?.parse().ok()
}

/// Refuses what is in the folder of this process, whose number is `own`, or of one of its threads.
/// `path` was looked up in `parent`.
pub fn admit(own: u32, parent: &File, path: &File) -> io::Result<()> {
    if process_of(parent) != Some(own) {
        return Ok(());
    }
    let place = read_link(&descriptor_name(path))?;
    let name = Path::new(OsStr::from_bytes(&place)).file_name().unwrap_or_default();
    if SHOWN.iter().any(|(shown, _)| name.as_bytes() == *shown) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    }
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

/// The text of `file`, if it is a table of this process's mounts: those beneath the entry of the
/// folder `volumes` through which it was opened.
pub fn table_of_mounts(own: u32, file: &File, volumes: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let place = read_link(&descriptor_name(file))?;
    let path = Path::new(OsStr::from_bytes(&place));
    let name = path.file_name().unwrap_or_default().as_bytes();
    let folder = path.parent().and_then(Path::file_name).unwrap_or_default().as_bytes();
    let shown = SHOWN.iter().find(|(shown, _)| name == *shown);
    let Some((_, column)) = shown.filter(|_| folder == own.to_string().as_bytes()) else {
        return Ok(None);
    };
    let in_folder = |path: &&Path| {
        path.parent().and_then(Path::file_name).is_some_and(|name| name.as_bytes() == volumes)
    };
    let Some(volume) = path.ancestors().find(in_folder) else { return Ok(None) };
    let mut text = Vec::new();
    file.take(TABLE).read_to_end(&mut text)?;
    Ok(Some(beneath(&text, *column, volume.as_os_str().as_bytes())))
}

/// The lines of `text` whose mount point, in that column, is beneath `volume`, named from there.
fn beneath(text: &[u8], column: usize, volume: &[u8]) -> Vec<u8> {
    let mut kept = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let mut columns: Vec<_> = line.split(|byte| *byte == b' ').collect();
        let Some(point) = columns.get_mut(column) else { continue };
        match point.strip_prefix(volume) {
            Some([]) => *point = b"/",
            Some(rest @ [b'/', ..]) => *point = rest,
            _ => continue,
        }
        kept.extend_from_slice(&columns.join(&b' '));
        kept.push(b'\n');
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_named_from_the_volume() {
        let table = b"20 1 0:20 / / rw - tmpfs none rw\n\
            21 20 8:1 / /.volumes/1 ro,nosuid shared:1 - ext4 /dev/sda1 rw\n\
            22 21 0:5 / /.volumes/1/proc ro - proc proc rw\n\
            23 20 0:6 / /.volumes/10 rw - tmpfs none rw\n";
        let kept = beneath(table, 4, b"/.volumes/1");
        assert_eq!(
            String::from_utf8(kept).unwrap(),
            "21 20 8:1 / / ro,nosuid shared:1 - ext4 /dev/sda1 rw\n\
             22 21 0:5 / /proc ro - proc proc rw\n"
        );
        let kept = beneath(b"proc /.volumes/1/proc proc rw 0 0\nx\n", 1, b"/.volumes/1");
        assert_eq!(kept, b"proc /proc proc rw 0 0\n");
    }
}
