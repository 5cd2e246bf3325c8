//! Has the kernel raise the events of what the host has changed on volumes.
//!
//! Each change is made once more in the agent's own view of the share. Announced by an attribute of the file
//! or folder, it is answered by the share's server and done by nobody: so it works on a volume that is
//! read-only, and what a program finds after the event is what the host has.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use husk_agent_protocols::SHARE_PATH;
use husk_agent_protocols::agent::VolumeChange;
use husk_agent_protocols::agent::volume_change::Kind;
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, futimens, mknod, utimensat};
use nix::sys::time::TimeSpec;
use rustix::fs::{AtFlags, CWD, StatxFlags, XattrFlags};

/// No name is longer.
const LONGEST_NAME: usize = 255;

/// Repeats `changes`, announced by the attribute `attribute`. The share may let the caller wait. What fails
/// is left out: the file may be gone again.
pub fn repeat(attribute: &str, changes: &[VolumeChange]) {
    for change in changes {
        let _ = Repeated::new(attribute, change).map(|repeated| repeated.raise());
    }
}

/// A change that is repeated.
struct Repeated<'a> {
    attribute: &'a str,
    volume: &'a Path,
    /// The name in the volume; empty for the volume itself.
    name: &'a [u8],
    before: &'a [u8],
    kind: Kind,
    is_folder: bool,
}

impl<'a> Repeated<'a> {
    /// Returns nothing for what is no change of a volume.
    fn new(attribute: &'a str, change: &'a VolumeChange) -> Option<Self> {
        let kind = change.kind.enum_value().ok()?;
        let volume = Path::new(&change.volume);
        let inside = volume.strip_prefix(SHARE_PATH).ok()?;
        let straight =
            inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let named = is_name(&change.name);
        let complete = match kind {
            Kind::CONTENT | Kind::ATTRIBUTES => named || change.name.is_empty(),
            Kind::CREATED | Kind::REMOVED => named,
            Kind::RENAMED => named && is_name(&change.before),
        };
        (straight && complete).then_some(Self {
            attribute,
            volume,
            name: &change.name,
            before: &change.before,
            kind,
            is_folder: change.is_folder,
        })
    }

    fn raise(&self) -> io::Result<()> {
        let place = self.path(self.name);
        let (plain, folder) = match self.kind {
            Kind::CONTENT | Kind::ATTRIBUTES => {
                return self.announced(&place, &[b"change"], || self.change(&place));
            }
            Kind::CREATED => ("create", "create"),
            Kind::REMOVED => ("remove", "remove-folder"),
            Kind::RENAMED => ("rename", "rename-folder"),
        };
        let operation = if self.is_folder { folder } else { plain }.as_bytes();
        match self.kind {
            Kind::RENAMED => {
                let old = self.path(self.before);
                self.announced(self.volume, &[operation, self.before, self.name], || {
                    fs::rename(&old, &place)
                })
            }
            _ => self.announced(self.volume, &[operation, self.name], || self.come_or_go(&place)),
        }
    }

    fn path(&self, name: &[u8]) -> PathBuf {
        // Joined with an empty name it would end with a slash.
        if name.is_empty() {
            self.volume.to_owned()
        } else {
            self.volume.join(OsStr::from_bytes(name))
        }
    }

    fn come_or_go(&self, place: &Path) -> io::Result<()> {
        match (self.kind, self.is_folder) {
            (Kind::CREATED, true) => fs::DirBuilder::new().mode(0o700).create(place),
            (Kind::CREATED, false) => Ok(mknod(place, SFlag::S_IFREG, Mode::S_IRUSR, 0)?),
            (_, true) => fs::remove_dir(place),
            (_, false) => fs::remove_file(place),
        }
    }

    /// Changes the content or the attributes of the announced file.
    fn change(&self, place: &Path) -> io::Result<()> {
        // What the kernel has kept of it goes first, as it does not look at the answers to its own changes.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::from_bits_retain(FORCE_SYNC);
        let status = rustix::fs::statx(CWD, place, flags, StatxFlags::BASIC_STATS)?;
        let (now, omitted) = (TimeSpec::UTIME_NOW, TimeSpec::UTIME_OMIT);
        let regular = u32::from(status.stx_mode) & libc::S_IFMT == libc::S_IFREG;
        if self.kind == Kind::CONTENT && regular {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = File::options().write(true).custom_flags(flags).open(place)?;
            // Of the time of modification alone: to the kernel the content was modified. Closing raises the
            // other event.
            return Ok(futimens(&file, &omitted, &now)?);
        }
        let flags = UtimensatFlags::NoFollowSymlink;
        Ok(utimensat(nix::fcntl::AT_FDCWD, place, &now, &now, flags)?)
    }

    /// Does `operation` on the file or folder `place` while it is announced by `words`.
    fn announced(
        &self,
        place: &Path,
        words: &[&[u8]],
        operation: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut value = Vec::new();
        for word in words {
            value.extend_from_slice(CString::new(*word)?.as_bytes_with_nul());
        }
        let announce = |value: &[u8]| {
            match rustix::fs::lsetxattr(place, self.attribute, value, XattrFlags::empty()) {
                // Anything else, and the operation would be done.
                Err(rustix::io::Errno::ALREADY) => Ok(()),
                Err(error) => Err(io::Error::from(error)),
                Ok(()) => Err(Errno::EOPNOTSUPP.into()),
            }
        };
        announce(&value)?;
        let done = operation();
        // The server forgets it with the next one, too.
        let _ = announce(b"");
        done
    }
}

/// `AT_STATX_FORCE_SYNC`.
const FORCE_SYNC: u32 = 0x2000;

fn is_name(name: &[u8]) -> bool {
    (1..=LONGEST_NAME).contains(&name.len())
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
        && !matches!(name, b"." | b"..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(volume: &str, kind: Kind, name: &str, before: &str) -> VolumeChange {
        VolumeChange {
            volume: volume.to_owned(),
            kind: kind.into(),
            name: name.into(),
            before: before.into(),
            ..Default::default()
        }
    }

    #[test]
    fn only_names_in_volumes_are_repeated() {
        let known = |volume: &str, kind, name: &str, before: &str| {
            let change = change(volume, kind, name, before);
            Repeated::new("trusted.x", &change).is_some()
        };
        let volume = "/run/husk/share/.volumes/7";
        assert!(known(volume, Kind::CREATED, "a", "") && known(volume, Kind::RENAMED, "a", "b"));
        assert!(known(volume, Kind::CONTENT, "", "") && known(volume, Kind::ATTRIBUTES, "a", ""));
        assert!(!known(volume, Kind::CREATED, "", "") && !known(volume, Kind::RENAMED, "a", ""));
        for name in ["..", ".", "a/b", "a\0b", &"x".repeat(256)] {
            assert!(!known(volume, Kind::REMOVED, name, ""), "{name:?}");
        }
        for volume in ["/etc", "/run/husk/share/../../etc", "relative"] {
            assert!(!known(volume, Kind::CREATED, "a", ""), "{volume}");
        }
    }

    #[test]
    fn nothing_is_done_where_the_announcement_is_not_understood() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "text").expect("a file");
        let change = change("/run/husk/share/x", Kind::REMOVED, "file", "");
        let repeated = Repeated {
            volume: folder.path(),
            ..Repeated::new("user.x", &change).expect("a change")
        };
        assert!(repeated.raise().is_err());
        assert!(file.exists());
    }
}
