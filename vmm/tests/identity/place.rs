//! File systems, each twice: one that is served and one to compare with.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use husk_stage::Stage;

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
    stage: Stage,
    kind: Kind,
    volumes: usize,
}

/// The place of a volume on the stage.
fn volume(name: &str) -> String {
    format!("share/{VOLUMES}/{GROUP}/{name}")
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
        husk_stage::leave_mounts().unwrap();
        let place = Self { stage: Stage::new_in("/dev/shm").unwrap(), kind, volumes: 0 };
        for copy in ["served", "plain"] {
            place.copy(copy, kind)?;
        }
        if kind == Kind::Volumes {
            fs::create_dir_all(place.share().join(VOLUMES).join(GROUP)).unwrap();
        }
        Some(place)
    }

    /// What the server has.
    pub fn share(&self) -> PathBuf {
        if self.has_volumes() { self.stage.path().join("share") } else { self.served() }
    }

    pub fn has_volumes(&self) -> bool {
        self.kind == Kind::Volumes
    }

    /// Binds a folder of the served copy as a volume; the volume's name.
    pub fn add_volume(&mut self, folder: &str, read_only: bool) -> String {
        let name = self.volumes.to_string();
        self.volumes += 1;
        let target = volume(&name);
        self.folder(&target);
        let source = format!("served/{folder}");
        self.stage.bind(source.trim_end_matches('/'), &target).unwrap();
        if read_only {
            self.stage.make_read_only(&target).unwrap();
        }
        name
    }

    /// Takes a volume away.
    pub fn remove_volume(&mut self, name: &str) {
        let target = volume(name);
        self.stage.unmount(&target).unwrap();
        fs::remove_dir(self.stage.path().join(target)).unwrap();
    }

    pub fn served(&self) -> PathBuf {
        self.stage.path().join("served")
    }

    pub fn plain(&self) -> PathBuf {
        self.stage.path().join("plain")
    }

    fn mount(&self, kind: &str, name: &str, data: &str) -> Option<()> {
        match self.stage.mount(kind, name, data) {
            Ok(_) => Some(()),
            Err(error) => {
                husk_skip::skipped(format!("cannot mount {kind}: {error}"));
                None
            }
        }
    }

    fn folder(&self, name: &str) -> PathBuf {
        let path = self.stage.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    fn copy(&self, copy: &str, kind: Kind) -> Option<()> {
        let target = self.folder(copy);
        match kind {
            Kind::Tmpfs | Kind::Volumes => self.mount("tmpfs", copy, "")?,
            Kind::Ext4 => {
                let image = self.stage.path().join(format!("{copy}.img"));
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
            }
            Kind::Bind => {
                let [first, second] = ["1", "2"].map(|number| format!("{copy}-{number}"));
                for name in [&first, &second] {
                    self.folder(name);
                }
                self.mount("tmpfs", &first, "")?;
                self.stage.bind(&first, &second).unwrap();
                self.stage.bind(&second, copy).unwrap();
            }
            Kind::Overlay | Kind::ScatteredOverlay => return self.overlay(copy, kind),
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

    fn overlay(&self, copy: &str, kind: Kind) -> Option<()> {
        let base = format!("{copy}-layers");
        let (low, top) = (format!("{base}/low"), format!("{base}/top"));
        self.folder(&base);
        self.mount("tmpfs", &base, "")?;
        for name in [&low, &top] {
            self.folder(name);
            if kind == Kind::ScatteredOverlay {
                self.mount("tmpfs", name, "")?;
            }
        }
        let lower = self.folder(&format!("{low}/l"));
        let [upper, work] = ["u", "w"].map(|name| self.folder(&format!("{top}/{name}")));
        fill(&lower, 0);
        fill(&upper, 1);
        let data = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        self.mount("overlay", copy, &data)
    }
}
