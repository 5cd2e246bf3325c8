//! The mounts of the calling thread's namespace, as `/proc/thread-self/mountinfo` lists them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// All mounts by their numbers.
#[derive(Debug)]
pub(super) struct MountTable(HashMap<u64, Entry>);

#[derive(Debug)]
struct Entry {
    parent: u64,
    /// The folder of the file system that is mounted.
    root: PathBuf,
    point: PathBuf,
    line: Vec<u8>,
}

impl MountTable {
    /// Reads the calling thread's table.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/thread-self/mountinfo")?))
    }

    fn parse(text: &[u8]) -> Self {
        let lines = text.split(|&byte| byte == b'\n');
        Self(lines.filter_map(Entry::parse).collect())
    }

    /// The line of a mount; `None` if it is in no folder of this namespace.
    pub(super) fn at(&self, mount: u64) -> Option<Vec<u8>> {
        self.0.get(&mount).map(|entry| entry.line.clone())
    }

    /// The path within its file system of `path`, which lies on `mount`.
    pub(super) fn within(&self, mount: u64, path: &Path) -> Option<PathBuf> {
        let Entry { root, point, .. } = self.0.get(&mount)?;
        // Not joined with nothing, which would end in a slash.
        let rest = path.strip_prefix(point).ok()?;
        Some(root.iter().chain(rest).collect())
    }

    /// The lines of the mounts beneath the folder `path`, which lies on `mount`, in a steady order.
    pub(super) fn beneath(&self, mount: u64, path: &Path) -> Vec<Vec<u8>> {
        let entries = self.entries_beneath(mount, path);
        let mut lines: Vec<_> = entries.map(|(_, entry)| entry.line.clone()).collect();
        lines.sort();
        lines
    }

    /// The numbers and the paths, relative to the folder `path` on `mount`, of all of a procfs that is
    /// mounted beneath it, in the order of the paths. Some may be hidden by other mounts.
    pub(super) fn procfs_beneath(&self, mount: u64, path: &Path) -> Vec<(u64, PathBuf)> {
        let whole = self.entries_beneath(mount, path).filter(|(_, entry)| entry.is_procfs());
        let mut found: Vec<_> = whole
            .filter_map(|(id, entry)| Some((*id, entry.point.strip_prefix(path).ok()?.to_owned())))
            .collect();
        found.sort_by(|(_, one), (_, other)| one.cmp(other));
        found
    }

    fn entries_beneath(&self, mount: u64, path: &Path) -> impl Iterator<Item = (&u64, &Entry)> {
        self.0.iter().filter(move |(_, entry)| {
            entry.point.starts_with(path) && entry.point != path && self.hangs_on(entry, mount)
        })
    }

    fn hangs_on(&self, entry: &Entry, mount: u64) -> bool {
        let mut parent = entry.parent;
        // As many steps as there are mounts: a table is no snapshot, and could show a circle.
        for _ in 0..self.0.len() {
            if parent == mount {
                return true;
            }
            let Some(next) = self.0.get(&parent) else { return false };
            parent = next.parent;
        }
        false
    }
}

impl Entry {
    /// The mount of one line, with its number: proc(5) has the fields.
    fn parse(line: &[u8]) -> Option<(u64, Self)> {
        let mut fields = line.split(|&byte| byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        let (root, point) = (unescaped(fields.nth(1)?), unescaped(fields.next()?));
        Some((id, Self { parent, root, point, line: line.to_vec() }))
    }

    /// Whether it is a procfs, and not a part of one.
    fn is_procfs(&self) -> bool {
        let mut fields = self.line.split(|&byte| byte == b' ');
        let whole = fields.nth(3) == Some(b"/");
        whole && fields.skip_while(|field| *field != b"-").nth(1) == Some(b"proc")
    }
}

/// A path without the octal escapes of blanks and backslashes.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        path.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_beneath_a_folder() {
        let text = b"1 0 0:1 /sub / rw - ext4 /dev/a rw\n\
            2 1 0:2 / /a\\040b rw shared:3 - tmpfs x rw\n\
            3 2 0:3 / /a\\040b/c rw - tmpfs y rw\n\
            4 1 0:4 / /a\\040bc rw - tmpfs z rw\n\
            5 1 0:5 / /a\\040b/c rw - tmpfs hidden rw\n\
            no mount\n";
        let table = MountTable::parse(text);
        let lines = |mount, path: &str| -> Vec<u8> {
            table.beneath(mount, Path::new(path)).iter().map(|line| line[0]).collect()
        };
        assert_eq!(lines(2, "/a b"), b"3");
        assert_eq!(lines(1, "/"), b"2345");
        assert_eq!(lines(1, "/a b"), b"35");
        assert!(lines(3, "/a b/c").is_empty());
        assert_eq!(table.at(4).unwrap(), b"4 1 0:4 / /a\\040bc rw - tmpfs z rw");
        assert_eq!(table.at(9), None);
        assert_eq!(table.within(1, Path::new("/x/y")).unwrap(), Path::new("/sub/x/y"));
        assert_eq!(table.within(2, Path::new("/a b")).unwrap(), Path::new("/"));
        assert_eq!(table.within(2, Path::new("/elsewhere")), None);
    }

    #[test]
    fn procfs_beneath_a_folder() {
        let text = b"1 0 0:1 / / rw - ext4 /dev/a rw\n\
            2 1 0:2 / /proc rw shared:1 - proc proc rw\n\
            3 2 0:3 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw\n\
            4 1 0:2 /sys /srv/part rw - proc proc rw\n\
            5 1 0:4 / /srv/jail/proc rw - proc none rw\n";
        let table = MountTable::parse(text);
        let found = |mount, path: &str| table.procfs_beneath(mount, Path::new(path));
        assert_eq!(found(1, "/"), [(2, "proc".into()), (5, "srv/jail/proc".into())]);
        assert_eq!(found(1, "/srv"), [(5, "jail/proc".into())]);
        assert_eq!(found(2, "/proc"), []);
    }

    #[test]
    fn a_circle_ends() {
        let table = MountTable::parse(b"1 2 0:1 / /a rw\n2 1 0:1 / /b rw\n");
        assert!(table.beneath(7, Path::new("/")).is_empty());
    }
}
