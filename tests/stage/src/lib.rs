//! Folders on which tests mount.
//!
//! To remove a folder recursively removes what is mounted in it: a test that binds the host's files below a
//! plain temporary folder can lose them. Every folder that a test mounts on, or has something mount on, is
//! a [`Stage`].

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::{Builder, TempDir};

const NONE: Option<&str> = None;

/// Gives the calling thread, and those it starts, a mount namespace of its own, from which no mount gets
/// out.
pub fn leave_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE)?;
    Ok(())
}

/// A temporary folder that may have mounts, in the calling thread's mount namespace.
///
/// Dropping unmounts all of them before it removes the folder, and leaves the folder where it is if one
/// stays: to remove what is mounted would remove what is not the test's. A value that has something
/// mounted on the stage, or open in it, is dropped before: struct fields in their order, variables in the
/// reverse of theirs.
#[derive(Debug)]
pub struct Stage {
    /// `None` only while it is dropped.
    folder: Option<TempDir>,
}

impl Stage {
    /// Makes an empty folder among the temporary ones, for the calling thread, which leaves the mounts of
    /// the others ([`leave_mounts`]).
    pub fn apart() -> io::Result<Self> {
        leave_mounts()?;
        Self::new()
    }

    /// Makes an empty folder among the temporary ones.
    pub fn new() -> io::Result<Self> {
        Self::new_in(std::env::temp_dir())
    }

    /// Makes an empty folder in `parent`.
    pub fn new_in(parent: impl AsRef<Path>) -> io::Result<Self> {
        // The kernel's table has paths without links.
        let parent = parent.as_ref().canonicalize()?;
        Ok(Self { folder: Some(Builder::new().prefix("stage").tempdir_in(parent)?) })
    }

    /// Returns the folder's path, which leads through no link.
    pub fn path(&self) -> &Path {
        self.folder.as_ref().map(TempDir::path).unwrap_or(Path::new(""))
    }

    /// Mounts a new file system of that kind on the stage's own `name`, or on the stage itself for "".
    pub fn mount(&self, kind: &str, name: &str, data: &str) -> io::Result<PathBuf> {
        let point = self.point(name)?;
        mount(Some("none"), &point, Some(kind), MsFlags::empty(), Some(data))?;
        Ok(point)
    }

    /// Binds the stage's own `source` to the stage's own `name`.
    pub fn bind(&self, source: &str, name: &str) -> io::Result<()> {
        let source = self.point(source)?;
        mount(Some(&source), &self.point(name)?, NONE, MsFlags::MS_BIND, NONE)?;
        Ok(())
    }

    /// Makes the mount on `name` read-only.
    pub fn make_read_only(&self, name: &str) -> io::Result<()> {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NONE, &self.point(name)?, NONE, flags, NONE)?;
        Ok(())
    }

    /// Has the mount on `name` hand on what is mounted beneath it later.
    pub fn make_shared(&self, name: &str) -> io::Result<()> {
        mount(NONE, &self.point(name)?, NONE, MsFlags::MS_SHARED, NONE)?;
        Ok(())
    }

    /// Unmounts what is on `name`.
    pub fn unmount(&self, name: &str) -> io::Result<()> {
        umount2(&self.point(name)?, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        Ok(())
    }

    /// The path of `name`, which must lead to a place beneath the stage without a link.
    fn point(&self, name: &str) -> io::Result<PathBuf> {
        let relative = Path::new(name);
        let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
        let point: PathBuf = self.path().join(relative).components().collect();
        if !plain || point.canonicalize()? != point {
            let text = format!("{name} is not beneath the stage");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(point)
    }

    /// Mount points at the folder and beneath it, the last one first; `None` if that cannot be told.
    fn mounted(&self) -> Option<Vec<PathBuf>> {
        let folder = self.path().canonicalize().ok()?;
        let table = std::fs::read("/proc/thread-self/mountinfo").ok()?;
        let points = table.split(|byte| *byte == b'\n').filter_map(|line| {
            let point = line.split(|byte| *byte == b' ').nth(4)?;
            Some(PathBuf::from(OsString::from_vec(unescaped(point))))
        });
        let mut points: Vec<_> = points.filter(|point| point.starts_with(&folder)).collect();
        points.reverse();
        Some(points)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for point in self.mounted().unwrap_or_default() {
            let _ = umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        let free = self.mounted().is_some_and(|points| points.is_empty());
        if !free && let Some(folder) = self.folder.take() {
            eprintln!("{} is still mounted on, and stays", folder.keep().display());
        }
    }
}

/// A path without the octal escapes of the kernel's table.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| byte == b'\\');
        let code =
            digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    path
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A failed test is a panic.
mod tests {
    use super::*;
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    use std::fs;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Runs a test in a thread with mounts of its own; not at all where that is forbidden.
    fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(|| {
            if leave_mounts().is_ok() {
                test()
            }
        })
        .join()
        .unwrap();
    }

    /// A stage on a file system of the test's own, on which `bind` puts what could be lost.
    fn stage_with_canary() -> (Stage, Stage, PathBuf) {
        let outer = Stage::new().unwrap();
        outer.mount("tmpfs", "", "").unwrap();
        for name in ["canary", "inner"] {
            fs::create_dir(outer.path().join(name)).unwrap();
        }
        let canary = outer.path().join("canary/file");
        fs::write(&canary, "").unwrap();
        let inner = Stage::new_in(outer.path().join("inner")).unwrap();
        for name in ["at", "white space", "at/beneath"] {
            fs::create_dir(inner.path().join(name)).unwrap();
        }
        (outer, inner, canary)
    }

    fn bind(source: &Path, target: &Path) {
        mount(Some(source), target, NONE, MsFlags::MS_BIND, NONE).unwrap();
    }

    #[test]
    fn what_is_mounted_is_unmounted_before_the_folder_goes() {
        with_own_mounts(|| {
            let (outer, inner, canary) = stage_with_canary();
            for name in ["white space", "at/beneath", "at", "at"] {
                bind(&outer.path().join("canary"), &inner.path().join(name));
            }
            let place = inner.path().to_owned();
            let panicked = catch_unwind(AssertUnwindSafe(move || {
                let _inner = inner;
                panic!("as a failed assertion");
            }));
            assert!(panicked.is_err() && canary.exists() && !place.exists());
        });
    }

    #[test]
    fn a_folder_that_cannot_be_unmounted_stays() {
        with_own_mounts(|| {
            let (outer, inner, canary) = stage_with_canary();
            bind(&outer.path().join("canary"), &inner.path().join("at"));
            let place = inner.path().to_owned();
            // A thread without capabilities can unmount nothing.
            let without = std::thread::spawn(move || {
                let mut sets = capabilities(None).unwrap();
                sets.effective = CapabilitySet::empty();
                set_capabilities(None, sets).unwrap();
                drop(inner);
            });
            without.join().unwrap();
            assert!(canary.exists() && place.exists());
        });
    }

    #[test]
    fn only_places_beneath_are_mounted_on() {
        with_own_mounts(|| {
            let stage = Stage::new().unwrap();
            std::os::unix::fs::symlink("/", stage.path().join("link")).unwrap();
            for name in ["..", "/", "/etc", "link", "link/etc", "none"] {
                stage.mount("tmpfs", name, "").unwrap_err();
            }
        });
    }
}
