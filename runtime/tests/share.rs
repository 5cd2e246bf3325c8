//! The shared folder beside a guest that does to it what it can, in the file server's view of it.

#![allow(clippy::unwrap_used)] // A failed test is a panic.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use husk_runtime::resource::{
    ContainerShare, RootfsMount, Share, SharedVolume, Sources, Volume, Volumes,
};
use husk_stage::Stage;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};

/// Volumes that are laid out and removed, unless `HUSK_VOLUMES` says otherwise.
const VOLUMES: usize = 400;

/// Volumes of one container.
const EACH: usize = 4;

/// Folders in which the guest finds what is to be mounted on.
const FOLDERS: [&str; 4] = [".", ".volumes", "c", "c/rootfs"];

/// Names that the shim uses in them, and one of the guest's.
const NAMES: [&CStr; 7] = [c"c", c".volumes", c"rootfs", c"inner", c"0", c"1", c"planted"];

fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = husk_skip::spawn(|| {
        if husk_stage::leave_mounts().is_err() {
            return husk_skip::skipped("no mount namespace can be made");
        }
        test();
    });
    thread.join().unwrap();
}

/// Where each mount of the calling thread's namespace is.
fn mount_points() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect()
}

/// A host with a folder that nothing is to reach.
struct Host {
    canary: PathBuf,
    source: PathBuf,
    image: PathBuf,
    place: Stage,
}

impl Host {
    fn new() -> Self {
        let place = Stage::new().unwrap();
        let path = |name: &str| place.path().join(name);
        let host =
            Self { canary: path("canary"), source: path("source"), image: path("image"), place };
        for folder in
            [&host.canary, &host.source, &host.image.join("inner"), &host.canary.join("0")]
        {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(host.canary.join("file"), "canary").unwrap();
        std::fs::write(host.source.join("file"), "source").unwrap();
        host
    }

    fn assert_untouched(&self) {
        let names = |folder: &Path| {
            let entries = std::fs::read_dir(folder).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.canary), ["0", "file"]);
        assert!(names(&self.canary.join("0")).is_empty());
        assert_eq!(std::fs::read_to_string(self.canary.join("file")).unwrap(), "canary");
        assert_eq!(names(&self.source), ["file"]);
        assert_eq!(std::fs::read_to_string(self.source.join("file")).unwrap(), "source");
    }

    fn rootfs(&self) -> Vec<RootfsMount> {
        let bind = |source: &Path, target: &str| RootfsMount {
            kind: "bind".to_owned(),
            source: source.to_str().unwrap().to_owned(),
            target: target.to_owned(),
            options: Vec::new(),
        };
        vec![bind(&self.image, ""), bind(&self.source, "inner")]
    }

    fn volume(&self, options: &[&str]) -> Volume {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Volume { source: self.source.clone(), options }
    }
}

/// Does once what a guest can ask of the file server, in one folder of the shared one. What is refused is
/// right; so is what is done to its own files.
fn attack(root: impl AsFd, folder: &str, canary: &Path, successes: &AtomicUsize) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::openat(root, folder, flags, Mode::empty()) else { return };
    let count = |done: rustix::io::Result<()>| {
        successes.fetch_add(usize::from(done.is_ok()), Ordering::Relaxed);
    };
    count(rustix::fs::symlinkat(canary, &folder, c"planted"));
    for name in NAMES {
        let swap = RenameFlags::EXCHANGE;
        count(rustix::fs::renameat_with(&folder, name, &folder, c"planted", swap));
        count(rustix::fs::renameat(&folder, name, &folder, c"moved"));
        count(rustix::fs::symlinkat(canary, &folder, name));
        count(rustix::fs::linkat(&folder, name, &folder, c"linked", AtFlags::empty()));
        count(rustix::fs::unlinkat(&folder, name, AtFlags::REMOVEDIR));
        count(rustix::fs::unlinkat(&folder, c"linked", AtFlags::empty()));
        count(rustix::fs::renameat(&folder, c"moved", &folder, name));
    }
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&folder, c"filling", create, Mode::RUSR);
    count(made.and_then(|file| rustix::io::write(file, &[0; 4096]).map(drop)));
}

/// Lays out one container with its volumes and takes it away.
fn lay_out(host: &Host, share: &Arc<Share>, volumes: &Volumes) {
    let options: [&[&str]; EACH] = [&["rbind"], &["rbind", "ro"], &["bind", "rro"], &["rslave"]];
    let taken: Vec<Arc<SharedVolume>> =
        options.iter().map(|options| volumes.take(&host.volume(options)).unwrap()).collect();
    for (volume, options) in taken.iter().zip(options) {
        let path = share.path().join(".volumes").join(volume.name());
        assert_eq!(std::fs::read_to_string(path.join("file")).unwrap(), "source");
        if options.iter().any(|option| option.ends_with("ro")) {
            let written = std::fs::write(path.join("file"), "written").unwrap_err();
            assert_eq!(written.raw_os_error(), Some(libc::EROFS), "{options:?}");
        }
    }
    // The image's folder may be a link just now: then nothing is mounted.
    drop(ContainerShare::create(share, "c", &host.rootfs(), taken));
    host.assert_untouched();
}

#[test]
fn a_guest_cannot_move_what_the_shim_mounts() {
    with_own_mounts(|| {
        let wanted = std::env::var("HUSK_VOLUMES").ok().map(|count| count.parse().unwrap());
        let rounds = wanted.unwrap_or(VOLUMES).div_ceil(EACH);
        let host = Host::new();
        let before = mount_points();
        let share = Share::create(host.place.path().join("share"), Sources::default()).unwrap();
        let volumes = Volumes::create(&share).unwrap();
        let own = share.path().to_str().unwrap().to_owned();
        let (ended, successes) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let root: File = share.open().unwrap();
                    while !ended.load(Ordering::Relaxed) {
                        // In its own files it succeeds: that is no wonder, and no harm.
                        let outer = AtomicUsize::new(0);
                        let groups = std::fs::read_dir(share.path().join(".volumes")).unwrap();
                        let groups =
                            groups.filter_map(|group| group.ok()?.file_name().into_string().ok());
                        let groups = groups.map(|group| format!(".volumes/{group}"));
                        for folder in
                            FOLDERS[..3].iter().map(|&folder| folder.to_owned()).chain(groups)
                        {
                            attack(&root, &folder, &host.canary, &outer);
                        }
                        assert_eq!(outer.into_inner(), 0, "the guest has changed the tree");
                        attack(&root, FOLDERS[3], &host.canary, &successes);
                    }
                });
            }
            for round in 0..rounds {
                lay_out(&host, &share, &volumes);
                if round % 16 == 0 {
                    let outside = mount_points()
                        .into_iter()
                        .find(|point| !before.contains(point) && !point.starts_with(&own));
                    assert_eq!(outside, None);
                }
            }
            ended.store(true, Ordering::Relaxed);
        });
        assert_ne!(successes.into_inner(), 0, "the guest reached nothing");
        let left = std::fs::read_dir(share.path().join(".volumes")).unwrap().count();
        assert_eq!(left, 0);
        drop((volumes, share));
        assert_eq!(mount_points(), before);
        assert!(!host.place.path().join("share").exists());
    });
}
