//! File systems, each twice: one that is served and one to compare with.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// What a name can be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Tmpfs,
    Ext4,
    /// A bind mount of a bind mount.
    Bind,
    /// Three volumes: a file system in memory, its folder `s` or `t`, and all of it again, read-only.
    Volumes,
    /// An overlay, all of whose layers are on one file system.
    Overlay,
    /// An overlay whose layers are on three file systems.
    ScatteredOverlay,
}

pub const PLACES: &[Kind] =
    &[Kind::Tmpfs, Kind::Ext4, Kind::Bind, Kind::Volumes, Kind::Overlay, Kind::ScatteredOverlay];

/// The folder of volumes, and that of those on one device.
pub const VOLUMES: &str = ".volumes";
pub const GROUP: &str = "group";

/// Two copies of one tree.
pub struct Place {
    folder: TempDir,
    kind: Kind,
    mounted: Vec<PathBuf>,
    volumes: usize,
}

fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> bool {
    let text = |text: &str| CString::new(text).unwrap();
    let (source, kind, data) = (text(source), text(kind), text(data));
    let target = text(target.to_str().unwrap());
    // SAFETY: all texts are terminated and outlive the call.
    let result = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    };
    result == 0
}

/// What is there at first: links of one file in both directories, links of another, single files.
fn fill(folder: &Path, layer: u32) {
    let at = |name: &str| folder.join(name);
    fs::create_dir(at("s")).unwrap();
    if layer == 0 {
        fs::write(at("a"), "the first file, with three names").unwrap();
        fs::set_permissions(at("a"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::hard_link(at("a"), at("b")).unwrap();
        fs::hard_link(at("a"), at("s/a")).unwrap();
        fs::write(at("c"), "the second file, with two").unwrap();
        fs::hard_link(at("c"), at("d")).unwrap();
    } else {
        fs::write(at("e"), "a file of the upper layer").unwrap();
        fs::write(at("s/b"), "another").unwrap();
        fs::hard_link(at("s/b"), at("s/c")).unwrap();
    }
}

impl Place {
    /// Makes both copies; `None` if this machine cannot.
    pub fn make(kind: Kind) -> Option<Self> {
        // SAFETY: takes plain flags.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) }, 0);
        assert!(mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, ""));
        let mut place = Self {
            folder: tempfile::tempdir_in("/dev/shm").unwrap(),
            kind,
            mounted: Vec::new(),
            volumes: 0,
        };
        for copy in ["served", "plain"] {
            place.copy(copy, kind)?;
        }
        if kind == Kind::Volumes {
            fs::create_dir_all(place.group()).unwrap();
        }
        Some(place)
    }

    /// What the server has.
    pub fn share(&self) -> PathBuf {
        if self.has_volumes() { self.folder.path().join("share") } else { self.served() }
    }

    pub fn has_volumes(&self) -> bool {
        self.kind == Kind::Volumes
    }

    fn group(&self) -> PathBuf {
        self.folder.path().join("share").join(VOLUMES).join(GROUP)
    }

    /// Binds a folder of the served copy as a volume; the volume's name.
    pub fn add_volume(&mut self, folder: &str, read_only: bool) -> String {
        let name = self.volumes.to_string();
        self.volumes += 1;
        let target = self.group().join(&name);
        fs::create_dir(&target).unwrap();
        let source = self.served().join(folder);
        self.mount(source.to_str().unwrap(), &target, "", libc::MS_BIND, "").unwrap();
        let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
        assert!(!read_only || mount("none", &target, "", flags, ""));
        name
    }

    /// Takes a volume away.
    pub fn remove_volume(&mut self, name: &str) {
        let target = self.group().join(name);
        self.mounted.retain(|mounted| *mounted != target);
        detach(&target);
        fs::remove_dir(target).unwrap();
    }

    pub fn served(&self) -> PathBuf {
        self.folder.path().join("served")
    }

    pub fn plain(&self) -> PathBuf {
        self.folder.path().join("plain")
    }

    fn folder(&self, copy: &str, name: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{copy}{name}"));
        fs::create_dir(&path).unwrap();
        path
    }

    fn mount(
        &mut self,
        what: &str,
        target: &Path,
        kind: &str,
        flags: libc::c_ulong,
        data: &str,
    ) -> Option<()> {
        if !mount(what, target, kind, flags, data) {
            let error = std::io::Error::last_os_error();
            husk_skip::skipped(format!("cannot mount {kind}: {error}"));
            return None;
        }
        self.mounted.push(target.to_owned());
        Some(())
    }

    fn tmpfs(&mut self, target: &Path) -> Option<()> {
        self.mount("none", target, "tmpfs", 0, "")
    }

    fn copy(&mut self, copy: &str, kind: Kind) -> Option<()> {
        let target = self.folder(copy, "");
        match kind {
            Kind::Tmpfs | Kind::Volumes => self.tmpfs(&target)?,
            Kind::Ext4 => {
                let image = self.folder.path().join(format!("{copy}.img"));
                fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
                let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status();
                let made = made.is_ok_and(|status| status.success())
                    && Command::new("mount")
                        .args(["-o", "loop"])
                        .args([&image, &target])
                        .status()
                        .is_ok_and(|status| status.success());
                if !made {
                    husk_skip::skipped("cannot mount ext4 by a loop device");
                    return None;
                }
                self.mounted.push(target.clone());
            }
            Kind::Bind => {
                let (first, second) = (self.folder(copy, "-1"), self.folder(copy, "-2"));
                self.tmpfs(&first)?;
                self.mount(first.to_str().unwrap(), &second, "", libc::MS_BIND, "")?;
                self.mount(second.to_str().unwrap(), &target, "", libc::MS_BIND, "")?;
            }
            Kind::Overlay | Kind::ScatteredOverlay => return self.overlay(copy, kind, &target),
        }
        fill(&target, 0);
        fs::remove_dir(target.join("s")).unwrap_err();
        let upper = target.join("upper");
        fs::create_dir(&upper).unwrap();
        fill(&upper, 1);
        fs::rename(upper.join("e"), target.join("e")).unwrap();
        for name in ["b", "c"] {
            fs::rename(upper.join("s").join(name), target.join("s").join(name)).unwrap();
        }
        fs::remove_dir_all(upper).unwrap();
        Some(())
    }

    fn overlay(&mut self, copy: &str, kind: Kind, target: &Path) -> Option<()> {
        let base = self.folder(copy, "-layers");
        let (low, top) = (base.join("low"), base.join("top"));
        self.tmpfs(&base)?;
        for folder in [&low, &top] {
            fs::create_dir(folder).unwrap();
            if kind == Kind::ScatteredOverlay {
                self.tmpfs(folder)?;
            }
        }
        let (lower, upper, work) = (low.join("l"), top.join("u"), top.join("w"));
        for folder in [&lower, &upper, &work] {
            fs::create_dir(folder).unwrap();
        }
        fill(&lower, 0);
        fill(&upper, 1);
        let data = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        self.mount("overlay", target, "overlay", 0, &data)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            detach(target);
        }
    }
}

fn detach(target: &Path) {
    let target = CString::new(target.to_str().unwrap()).unwrap();
    // SAFETY: the path is terminated.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}
