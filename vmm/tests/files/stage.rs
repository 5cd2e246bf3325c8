//! Folders on which tests mount.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use tempfile::{TempDir, tempdir};

/// A folder that may have mounts, in a mount namespace of the calling thread's own. Dropping unmounts
/// all of them before it removes the folder, and leaves the folder where it is if that fails: to remove
/// what is mounted would remove what is not the test's.
pub struct Stage {
    /// `None` only while it is dropped.
    folder: Option<TempDir>,
}

impl Stage {
    /// Makes an empty folder. The calling thread, and those it starts, get mounts of their own.
    pub fn new() -> Self {
        // SAFETY: takes plain flags.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) }, 0);
        let private = libc::MS_REC | libc::MS_PRIVATE;
        mount(OsStr::new("none"), Path::new("/"), "", private, "");
        Self { folder: Some(tempdir().unwrap()) }
    }

    pub fn path(&self) -> &Path {
        self.folder.as_ref().unwrap().path()
    }

    /// Mounts a new file system of that kind on the folder `name`, or on the stage's own for "".
    pub fn mount(&self, kind: &str, name: &str, data: &str) -> PathBuf {
        let at = self.point(name);
        mount(OsStr::new("none"), &at, kind, 0, data);
        at
    }

    /// Binds the stage's own `source` to the stage's own `name`.
    pub fn bind(&self, source: &str, name: &str) {
        mount(self.point(source).as_os_str(), &self.point(name), "", libc::MS_BIND, "");
    }

    /// Takes away what is mounted on the folder or file `name`.
    pub fn unmount(&self, name: &str) {
        let point = CString::new(self.point(name).as_os_str().as_bytes()).unwrap();
        let flags = libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW;
        // SAFETY: the path is terminated.
        assert_eq!(unsafe { libc::umount2(point.as_ptr(), flags) }, 0);
    }

    /// Makes the mount on `name` read-only.
    pub fn make_read_only(&self, name: &str) {
        let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
        mount(OsStr::new("none"), &self.point(name), "", flags, "");
    }

    fn point(&self, name: &str) -> PathBuf {
        let relative = Path::new(name);
        let plain =
            relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        assert!(plain, "{name} is not beneath the stage");
        let point = self.path().join(relative);
        assert_eq!(point.canonicalize().unwrap(), point.components().collect::<PathBuf>());
        point
    }

    /// Mount points at the folder and beneath it, the last one first; `None` if that cannot be told.
    fn mounted(&self) -> Option<Vec<PathBuf>> {
        let folder = self.folder.as_ref()?.path().canonicalize().ok()?;
        let table = std::fs::read("/proc/thread-self/mountinfo").ok()?;
        let points = table.split(|byte| *byte == b'\n').filter_map(|line| {
            let point = line.split(|byte| *byte == b' ').nth(4)?;
            Some(PathBuf::from(OsString::from_vec(point.to_vec())))
        });
        let mut points: Vec<_> = points.filter(|point| point.starts_with(&folder)).collect();
        points.reverse();
        Some(points)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for point in self.mounted().unwrap_or_default() {
            let point = CString::new(point.as_os_str().as_bytes()).unwrap();
            // SAFETY: the path is terminated.
            unsafe { libc::umount2(point.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
        }
        let free = self.mounted().is_some_and(|points| points.is_empty());
        if !free && let Some(folder) = self.folder.take() {
            eprintln!("{} is still mounted on, and stays", folder.keep().display());
        }
    }
}

fn mount(source: &OsStr, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) {
    let text = |text: &[u8]| CString::new(text).unwrap();
    let (source, target) = (text(source.as_bytes()), text(target.as_os_str().as_bytes()));
    let (kind, data) = (text(kind.as_bytes()), text(data.as_bytes()));
    // SAFETY: all texts are terminated and outlive the call.
    let result = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    };
    assert_eq!(result, 0, "mount: {}", std::io::Error::last_os_error());
}

#[test]
fn a_stage_unmounts_before_it_is_removed() {
    if !crate::client::is_root() {
        return;
    }
    // What is bound lies on a file system of the test's own, so nothing else could be lost.
    let outer = Stage::new();
    outer.mount("tmpfs", "", "");
    for name in ["canary", "inner"] {
        std::fs::create_dir(outer.path().join(name)).unwrap();
    }
    let canary = outer.path().join("canary/file");
    std::fs::write(&canary, "").unwrap();
    let inner = Stage { folder: Some(TempDir::new_in(outer.path().join("inner")).unwrap()) };
    let at = inner.path().join("at");
    std::fs::create_dir(&at).unwrap();
    mount(outer.path().join("canary").as_os_str(), &at, "", libc::MS_BIND, "");
    let place = inner.path().to_owned();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _inner = inner;
        panic!("as a failed assertion");
    }));
    assert!(panicked.is_err() && canary.exists() && !place.exists());
}
