//! The volumes of a sandbox: what several containers bind is bound once.
//!
//! Volumes on one device are in one folder, which is one file system to the guest: what lies in several of
//! them, as in a folder and in a subfolder of it, is one file there. Only then do those who have it share
//! more than its bytes: a socket's other end, a lock, a mapped page.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use husk_agent_protocols::MEMORY_VOLUMES_PATH;
use nix::mount::MsFlags;
use oci_spec::runtime::Spec;

use super::changes::{Changes, Watched, is_watched};
use super::guest_memory::{self, GuestMemory, MemoryVolume, is_bind};
use super::share::Point;
use super::sources::{Identity, Opened};
use super::{MountOptions, ResourceError, Share, Volume, VolumeKind, volume};
use crate::lock::lock;

/// The folder of the volumes in the shared folder; no container has such a name.
pub const VOLUMES: &str = ".volumes";

/// All volumes of one sandbox.
#[derive(Debug)]
pub struct Volumes {
    share: Arc<Share>,
    _folder: Point,
    held: Mutex<Held>,
    changes: Arc<Changes>,
    memory: GuestMemory,
}

#[derive(Debug, Default)]
struct Held {
    volumes: HashMap<Key, Weak<SharedVolume>>,
    groups: HashMap<Device, Weak<Group>>,
    next: u64,
}

/// Major and minor number.
type Device = (u32, u32);

/// The folder of the volumes on one device, as long as there are any.
#[derive(Debug)]
struct Group {
    name: String,
    _point: Point,
}

/// The key under which a volume is shared: the identity of its source, and the options.
type Key = (Identity, Vec<String>);

/// A volume as long as a container has it. Dropping the last one unmounts it.
#[derive(Debug)]
pub struct SharedVolume {
    name: String,
    read_only_by_host: bool,
    procfs: Vec<PathBuf>,
    _watched: Option<Watched>,
    // In the order of dropping.
    _point: Point,
    _group: Option<Arc<Group>>,
}

impl SharedVolume {
    /// The path in the folder of volumes. Names are never used again: the guest may remember one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the host alone keeps the volume from being written to, as some of what is mounted beneath
    /// it may be: a read-only mount of the guest's would keep it from all.
    pub fn read_only_by_host(&self) -> bool {
        self.read_only_by_host
    }

    /// Where the source has a procfs, as paths relative to its root; the volume has empty folders there. A
    /// source that is a procfs itself has none.
    pub fn procfs(&self) -> &[PathBuf] {
        &self.procfs
    }
}

impl Volumes {
    /// No volumes yet, in the shared folder `share`.
    pub fn create(share: &Arc<Share>) -> Result<Self, ResourceError> {
        let folder = Point::folder(share, PathBuf::from(VOLUMES))?;
        Ok(Self {
            share: Arc::clone(share),
            _folder: folder,
            held: Mutex::default(),
            changes: Arc::default(),
            memory: GuestMemory::default(),
        })
    }

    /// The changes that the host makes on them.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// Says what a source is, following links.
    pub fn kind(&self, source: &Path) -> io::Result<VolumeKind> {
        self.share.sources().kind(source)
    }

    /// Takes the folders out of the spec of container `id` that are to be memory of the guest's, and returns
    /// them; their mounts name the guest's then.
    pub fn take_memory(&self, spec: &mut Spec, id: &str, alone: bool) -> Vec<MemoryVolume> {
        let host = self.share.sources().host();
        let mut taken = Vec::new();
        for mount in spec.mounts_mut().iter_mut().flatten().filter(|mount| is_bind(mount)) {
            let Some(source) = mount.source().clone() else { continue };
            // One that cannot be looked at is bound as it is, which says why.
            if let Ok(Some(memory)) = self.memory.of(host, &source) {
                mount.set_source(Some(Path::new(MEMORY_VOLUMES_PATH).join(&memory.name)));
                taken.push(memory);
            }
        }
        if alone {
            guest_memory::lay_out_shared_memory(spec, id, host);
        }
        taken
    }

    /// The volume, mounted now or by another container before.
    pub fn take(&self, wanted: &Volume) -> Result<Arc<SharedVolume>, ResourceError> {
        let options = MountOptions::parse(&wanted.options)?;
        let source = &wanted.source;
        let opened = self.share.sources().open(source, &options);
        // Not under the lock: a file system that does not answer holds up its own containers only.
        let opened = opened
            .map_err(|error| ResourceError::Source { path: source.clone(), source: error })?;
        let Opened { mount, kind, identity, has_mounts, procfs } = opened;
        let read_only_by_host = may_be_mixed(&options, has_mounts);
        let device = identity.device;
        // Only if the guest's kernel judges who may write: the file server writes by any volume of the
        // group that has the file.
        let asked = options.flags.contains(MsFlags::MS_RDONLY);
        let alone = read_only_by_host || (!asked && mount.is_read_only());
        let key = (identity, wanted.options.clone());
        let mut held = lock(&self.held);
        held.volumes.retain(|_, volume| volume.strong_count() != 0);
        if let Some(volume) = held.volumes.get(&key).and_then(Weak::upgrade) {
            return Ok(volume);
        }
        let group = if alone { None } else { Some(held.group(&self.share, device)?) };
        let name = held.name();
        let name = group.as_ref().map_or(name.clone(), |group| format!("{}/{name}", group.name));
        let place = Path::new(VOLUMES).join(&name);
        // Without a watch programs in the guest only hear less, as on a host that allows no more.
        let watched =
            is_watched(source, kind).then(|| self.changes.watch(mount.root(), kind, &name));
        let watched = watched.and_then(Result::ok);
        let point = volume::attach(mount, kind, source, &self.share, place)?;
        // What the guest mounts there is then the only one, in its table too.
        for inner in &procfs {
            point.uncover(inner).map_err(|error| ResourceError::Mount {
                what: "an empty folder".to_owned(),
                target: point.path().join(inner),
                source: error,
            })?;
        }
        let shared = SharedVolume {
            name,
            read_only_by_host,
            procfs,
            _watched: watched,
            _point: point,
            _group: group,
        };
        let shared = Arc::new(shared);
        held.volumes.insert(key, Arc::downgrade(&shared));
        Ok(shared)
    }
}

impl Held {
    /// Returns a name that was never used before.
    fn name(&mut self) -> String {
        self.next += 1;
        (self.next - 1).to_string()
    }

    /// Returns the folder of the volumes on a device, made now or with an earlier one.
    fn group(&mut self, share: &Arc<Share>, device: Device) -> Result<Arc<Group>, ResourceError> {
        self.groups.retain(|_, group| group.strong_count() != 0);
        if let Some(group) = self.groups.get(&device).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let name = format!("{}-{}-{}", device.0, device.1, self.name());
        let point = Point::folder(share, Path::new(VOLUMES).join(&name))?;
        let group = Arc::new(Group { name, _point: point });
        self.groups.insert(device, Arc::downgrade(&group));
        Ok(group)
    }
}

/// Whether a read-only volume has mounts beneath it that stay writable, or may get some.
fn may_be_mixed(options: &MountOptions, has_mounts: bool) -> bool {
    let gets_mounts = options.propagation.contains(MsFlags::MS_SLAVE);
    options.flags.contains(MsFlags::MS_RDONLY | MsFlags::MS_REC)
        && !options.recursive_read_only
        && (has_mounts || gets_mounts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apart::HostMounts;
    use crate::apart::tests::{leave_mounts, with_own_mounts};
    use nix::mount::{MntFlags, mount, umount2};
    use std::fs::File;

    use crate::resource::Sources;

    /// A share, and a source with a file in it.
    struct Stage {
        source: PathBuf,
        volumes: Volumes,
        share: Arc<Share>,
        place: husk_stage::Stage,
    }

    impl Stage {
        fn new(host: HostMounts) -> Self {
            let place = husk_stage::Stage::new().unwrap();
            let source = place.path().join("source");
            std::fs::create_dir_all(source.join("beneath")).unwrap();
            std::fs::write(source.join("file"), "text").unwrap();
            let sources = Sources::new(host, place.path().join("etc"));
            let share = Share::create(place.path().join("share"), sources).unwrap();
            let volumes = Volumes::create(&share).unwrap();
            Self { source, volumes, share, place }
        }

        fn take(&self, options: &[&str]) -> Arc<SharedVolume> {
            let options = options.iter().map(|&option| option.to_owned()).collect();
            self.volumes.take(&Volume { source: self.source.clone(), options }).unwrap()
        }

        fn path(&self, volume: &SharedVolume) -> PathBuf {
            self.share.path().join(VOLUMES).join(volume.name())
        }
    }

    fn mount_tmpfs(path: &Path) {
        mount(Some("x"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    }

    /// The flags of a mount, as the kernel's table has them.
    fn flags(path: &Path) -> String {
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let point = format!(" {} ", path.display());
        let line = table.lines().rev().find(|line| line.contains(&point)).unwrap();
        line.split(' ').skip(5).take_while(|field| *field != "-").collect::<Vec<_>>().join(" ")
    }

    fn writable(folder: &Path) -> bool {
        std::fs::write(folder.join("written"), "").is_ok()
    }

    #[test]
    fn containers_with_the_same_source_have_the_same_volume() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let first = stage.take(&["rbind"]);
            let second = stage.take(&["rbind"]);
            assert_eq!(first.name(), second.name());
            let other = stage.take(&["rbind", "ro"]);
            assert_ne!(first.name(), other.name());
            let path = stage.path(&first);
            drop(first);
            assert_eq!(std::fs::read_to_string(path.join("file")).unwrap(), "text");
            drop(second);
            assert!(!path.exists());
            let again = stage.take(&["rbind"]);
            assert!(!path.ends_with(again.name()));
            drop((again, other));
            assert_eq!(std::fs::read_dir(stage.share.path().join(VOLUMES)).unwrap().count(), 0);
        });
    }

    #[test]
    fn volumes_on_one_device_are_in_one_folder_if_the_guest_judges_who_may_write() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let folder = |volume: &SharedVolume| {
                Path::new(volume.name()).parent().map(Path::to_path_buf).unwrap()
            };
            let take = |path: &str, options: &[&str]| {
                let options = options.iter().map(|&option| option.to_owned()).collect();
                stage.volumes.take(&Volume { source: stage.source.join(path), options }).unwrap()
            };
            let whole = take("", &["rbind"]);
            let group = folder(&whole);
            assert_ne!(group, Path::new(""));
            for (path, options) in [("", "ro"), ("beneath", "rw"), ("file", "rw"), ("file", "ro")] {
                assert_eq!(folder(&take(path, &["bind", options])), group, "{path} {options}");
            }
            mount_tmpfs(&stage.source.join("beneath"));
            assert_ne!(folder(&take("beneath", &[])), group);
            // The mount beneath stays writable, so the guest's is not read-only.
            assert_eq!(folder(&take("", &["rbind", "ro"])), Path::new(""));
            // Nor does the guest know of a host's mount that is.
            let none = None::<&str>;
            let beneath = stage.source.join("beneath");
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(none, &beneath, none, flags, none).unwrap();
            assert_eq!(folder(&take("beneath", &["bind"])), Path::new(""));
            assert_ne!(folder(&take("beneath", &["bind", "ro"])), Path::new(""));
            let path = stage.share.path().join(VOLUMES).join(&group);
            assert!(path.is_dir());
            drop(whole);
            assert!(!path.exists());
            umount2(&beneath, MntFlags::empty()).unwrap();
            let again = take("", &["rbind"]);
            assert_ne!(folder(&again), group);
        });
    }

    #[test]
    fn another_folder_or_mount_at_the_same_path_is_another_volume() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let first = stage.take(&["rbind"]);
            mount_tmpfs(&stage.source.join("beneath"));
            let second = stage.take(&["rbind"]);
            assert_ne!(first.name(), second.name());
            umount2(&stage.source.join("beneath"), MntFlags::empty()).unwrap();
            std::fs::rename(&stage.source, stage.source.with_extension("old")).unwrap();
            std::fs::create_dir(&stage.source).unwrap();
            let third = stage.take(&["rbind"]);
            assert!(third.name() != first.name() && third.name() != second.name());
            assert!(!stage.path(&third).join("file").exists());
        });
    }

    #[test]
    fn read_only_holds_for_the_mount_or_for_all_beneath() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let whole = stage.take(&["rbind", "ro"]);
            assert!(!whole.read_only_by_host());
            mount_tmpfs(&stage.source.join("beneath"));
            let top = stage.take(&["rbind", "ro"]);
            assert!(top.read_only_by_host());
            let path = stage.path(&top);
            assert!(!writable(&path) && writable(&path.join("beneath")));
            let all = stage.take(&["rbind", "rro"]);
            assert!(!all.read_only_by_host());
            let path = stage.path(&all);
            assert!(!writable(&path) && !writable(&path.join("beneath")));
            let alone = stage.take(&["bind", "ro"]);
            assert!(!alone.read_only_by_host());
            assert!(!writable(&stage.path(&alone).join("beneath")));
            let open = stage.take(&["rbind"]);
            assert!(writable(&stage.path(&open)));
            for path in [stage.path(&open), stage.path(&open).join("beneath")] {
                assert!(flags(&path).starts_with("rw,nosuid,nodev,noexec"), "{}", flags(&path));
            }
            assert!(flags(stage.share.path()).starts_with("ro,nosuid,nodev,noexec"));
        });
    }

    #[test]
    fn later_mounts_are_seen_only_if_asked_for() {
        with_own_mounts(|| {
            let (none, shared) = (None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC);
            mount(none, "/", none, shared, none).unwrap();
            let stage = Stage::new(HostMounts::default());
            let private = stage.take(&["rbind"]);
            let asked = stage.take(&["rbind", "rprivate"]);
            let slave = stage.take(&["rbind", "rslave", "ro"]);
            assert!(slave.read_only_by_host());
            mount_tmpfs(&stage.source.join("beneath"));
            File::create(stage.source.join("beneath/later")).unwrap();
            assert!(stage.path(&slave).join("beneath/later").exists());
            assert!(!stage.path(&private).join("beneath/later").exists());
            assert!(!stage.path(&asked).join("beneath/later").exists());
            // Nothing of the share's is the host's.
            mount_tmpfs(&stage.path(&slave).join("beneath"));
            assert!(stage.source.join("beneath/later").exists());
        });
    }

    #[test]
    fn what_the_host_mounts_later_is_a_source_though_its_root_is_private() {
        with_own_mounts(|| {
            let host = File::open("/proc/thread-self/ns/mnt").unwrap();
            let place = husk_stage::Stage::new().unwrap();
            let late = place.path().join("late");
            std::fs::create_dir(&late).unwrap();
            let (left, has_left) = std::sync::mpsc::channel();
            let (mounted, is_mounted) = std::sync::mpsc::channel::<()>();
            // The shim's namespace is a copy that gets nothing.
            let shim = husk_skip::spawn({
                let late = late.clone();
                move || {
                    assert!(leave_mounts());
                    left.send(()).unwrap();
                    is_mounted.recv().unwrap();
                    let stage = Stage::new(HostMounts(Some(Arc::new(host))));
                    assert!(!late.join("file").exists());
                    let volume = Volume { source: late, options: Vec::new() };
                    let volume = stage.volumes.take(&volume).unwrap();
                    assert!(stage.path(&volume).join("file").exists());
                }
            });
            has_left.recv().unwrap();
            mount_tmpfs(&late);
            File::create(late.join("file")).unwrap();
            mounted.send(()).unwrap();
            shim.join().unwrap();
            umount2(&late, MntFlags::empty()).unwrap();
        });
    }

    #[test]
    fn a_procfs_beneath_is_told_where_it_shows() {
        if !Path::new("/run/machine").exists() {
            return husk_skip::skipped("a procfs is mounted in the test machine only");
        }
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            for name in ["proc", "hidden/proc", "part"] {
                std::fs::create_dir_all(stage.source.join(name)).unwrap();
            }
            let place = &stage.place;
            for name in ["source/proc", "source/hidden/proc"] {
                place.mount("proc", name, "").unwrap();
            }
            place.bind("source/proc/sys", "source/part").unwrap();
            place.mount("tmpfs", "source/hidden", "").unwrap();
            let procfs = |options: &[&str]| stage.take(options).procfs().to_vec();
            let volume = stage.take(&["rbind", "ro"]);
            assert_eq!(volume.procfs(), [Path::new("proc")]);
            assert!(!stage.path(&volume).join("proc/self").exists());
            assert!(stage.source.join("proc/self").exists());
            drop(volume);
            assert!(procfs(&["bind"]).is_empty());
            let whole = Volume { source: stage.source.join("proc"), options: vec!["rbind".into()] };
            assert!(stage.volumes.take(&whole).unwrap().procfs().is_empty());
        });
    }

    #[test]
    fn a_mount_in_a_volume_is_taken_away() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let beneath = stage.source.join("beneath");
            mount_tmpfs(&beneath);
            File::create(beneath.join("file")).unwrap();
            let volume = stage.take(&["rbind", "ro"]);
            let shown = stage.path(&volume).join("beneath/file");
            assert!(shown.exists());
            volume._point.uncover(Path::new("beneath")).unwrap();
            assert!(!shown.exists() && beneath.join("file").exists());
            volume._point.uncover(Path::new("beneath")).unwrap_err();
            volume._point.uncover(Path::new("../0")).unwrap_err();
            assert!(stage.path(&volume).join("file").exists());
        });
    }

    #[test]
    fn only_folders_and_files_are_mounted() {
        with_own_mounts(|| {
            let stage = Stage::new(HostMounts::default());
            let take = |source: PathBuf| {
                stage.volumes.take(&Volume { source, options: Vec::new() }).map(drop)
            };
            take(stage.source.join("file")).unwrap();
            let error = take("/dev/null".into()).unwrap_err();
            assert!(matches!(error, ResourceError::Kind { .. }), "{error}");
            let error = take(stage.source.join("none")).unwrap_err();
            assert!(matches!(error, ResourceError::Source { .. }), "{error}");
            assert_eq!(std::fs::read_dir(stage.share.path().join(VOLUMES)).unwrap().count(), 0);
        });
    }
}
