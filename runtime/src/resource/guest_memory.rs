//! Folders of memory that engines lay out for containers, which become memory of the guest's.
//!
//! A Kubernetes `emptyDir` of `medium: Memory` is a tmpfs of the host's. Through the shared folder it would be
//! slow, and its bytes nobody's. While it is empty nothing tells it from one in the guest, which the pod's
//! containers share, and which is charged to them. Whatever a container has been given for a file system of
//! the host's holds for as long as the sandbox lives: all that mount it, or a folder of it, find the same.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{AtFlags, StatxFlags};

use super::detached::{errno, find};
use super::mount_table::MountTable;
use super::sources::path_of;
use crate::apart::HostMounts;
use crate::lock::lock;

/// `linux/magic.h`
const TMPFS: u64 = 0x0102_1994;

/// Folders in the paths of the kubelet's volumes: an `emptyDir`, and a `subPath` of any volume.
const KUBELETS: [&str; 2] = ["kubernetes.io~empty-dir", "volume-subpaths"];

/// Memory of the guest's in the place of a folder of the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryVolume {
    /// The name in the guest's folder of such memory.
    pub name: String,
    /// Mode of the folder.
    pub mode: u32,
    /// Owner of the folder.
    pub uid: u32,
    /// Group of the folder.
    pub gid: u32,
    /// Bytes that fit in.
    pub size: u64,
    /// Files that fit in.
    pub files: u64,
    /// Name of the memory whose folder it is; empty for memory of its own.
    pub volume: String,
    /// The path of the folder in that.
    pub folder: PathBuf,
}

/// The judgements of one sandbox, by the host's file system.
#[derive(Debug, Default)]
pub(super) struct GuestMemory(Mutex<HashMap<(u32, u32), Judgement>>);

#[derive(Debug)]
enum Judgement {
    /// The folder stays the host's.
    Host,
    /// Memory of the guest's, and folders of it by their paths.
    Guest { number: usize, folders: HashMap<PathBuf, usize> },
}

/// A folder on a tmpfs of the host's.
#[derive(Debug)]
struct Folder {
    device: (u32, u32),
    /// The path within the file system.
    path: PathBuf,
    empty: bool,
    volume: MemoryVolume,
}

impl GuestMemory {
    /// Returns the guest's memory for the kubelet's folder at `source`, if it has become that.
    pub(super) fn of(&self, host: &HostMounts, source: &Path) -> io::Result<Option<MemoryVolume>> {
        if !source.iter().any(|name| KUBELETS.iter().any(|known| name == *known)) {
            return Ok(None);
        }
        Ok(host.within(|| Folder::look(source))?.and_then(|folder| self.judge(folder)))
    }

    fn judge(&self, folder: Folder) -> Option<MemoryVolume> {
        let mut judgements = lock(&self.0);
        let (next, whole) = (judgements.len(), folder.path == Path::new("/"));
        let judgement =
            judgements.entry(folder.device).or_insert_with(|| match whole && folder.empty {
                true => Judgement::Guest { number: next, folders: HashMap::new() },
                false => Judgement::Host,
            });
        let Judgement::Guest { number, folders } = judgement else { return None };
        if whole {
            return Some(MemoryVolume { name: number.to_string(), ..folder.volume });
        }
        let next = folders.len();
        let own = folders.entry(folder.path.clone()).or_insert(next);
        Some(MemoryVolume {
            name: format!("{number}-{own}"),
            volume: number.to_string(),
            folder: folder.path,
            ..folder.volume
        })
    }
}

impl Folder {
    /// Looks at `source` in the calling thread's mount namespace; `None` if it is no folder of a tmpfs.
    fn look(source: &Path) -> io::Result<Option<Self>> {
        let opened = find(source)?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let status = rustix::fs::statx(&opened, c"", AtFlags::EMPTY_PATH, wanted).map_err(errno)?;
        let kind = u64::try_from(rustix::fs::fstatfs(&opened)?.f_type).unwrap_or(0);
        if kind != TMPFS || u32::from(status.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Ok(None);
        }
        let room = rustix::fs::fstatvfs(&opened)?;
        let real = path_of(&opened)?;
        let Some(path) = MountTable::read()?.within(status.stx_mnt_id, &real) else {
            return Ok(None);
        };
        let volume = MemoryVolume {
            mode: u32::from(status.stx_mode) & 0o7777,
            uid: status.stx_uid,
            gid: status.stx_gid,
            size: room.f_blocks.saturating_mul(room.f_frsize),
            files: room.f_files,
            ..MemoryVolume::default()
        };
        let empty = std::fs::read_dir(&real)?.next().is_none();
        let device = (status.stx_dev_major, status.stx_dev_minor);
        Ok(Some(Self { device, path, empty, volume }))
    }
}

/// Makes the `/dev/shm` that an engine has laid out for the lone container `id` memory of the guest's, of the
/// same size; Docker does so for `--ipc=shareable`.
pub(super) fn lay_out_shared_memory(spec: &mut Spec, id: &str, host: &HostMounts) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(source) = mount.source().clone().filter(|source| is_shared_memory(source, id))
        else {
            continue;
        };
        if mount.destination() != Path::new("/dev/shm") || !is_bind(mount) {
            continue;
        }
        // One that cannot be looked at is bound as it is, which says why.
        if let Ok(Some(folder)) = host.within(|| Folder::look(&source)) {
            let size = format!("size={}", folder.volume.size);
            let options = ["nosuid", "noexec", "nodev", "mode=1777", &size];
            mount.set_typ(Some("tmpfs".to_owned())).set_source(Some("shm".into()));
            mount.set_options(Some(options.map(str::to_owned).to_vec()));
        }
    }
}

/// Whether an engine has laid out `source` as the shared memory of the container or sandbox `id`.
pub(crate) fn is_shared_memory(source: &Path, id: &str) -> bool {
    source.file_name().is_some_and(|name| name == "shm") && source.iter().any(|name| name == id)
}

/// Whether a mount binds a path.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apart::tests::with_own_mounts;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    fn folder(device: u32, path: &str, empty: bool) -> Folder {
        let volume = MemoryVolume { mode: 0o777, ..MemoryVolume::default() };
        Folder { device: (0, device), path: path.into(), empty, volume }
    }

    #[test]
    fn all_that_mount_a_file_system_find_the_same() {
        let memory = GuestMemory::default();
        let name = |folder| memory.judge(folder).map(|volume| (volume.name, volume.volume));
        let named = |name: &str, of: &str| Some((name.to_owned(), of.to_owned()));
        assert_eq!(name(folder(1, "/", true)), named("0", ""));
        // The guest's containers have written since, or so it seems.
        assert_eq!(name(folder(1, "/", false)), named("0", ""));
        assert_eq!(name(folder(1, "/a/b", true)), named("0-0", "0"));
        assert_eq!(name(folder(1, "/c", true)), named("0-1", "0"));
        assert_eq!(name(folder(1, "/a/b", true)), named("0-0", "0"));
        for (path, empty) in [("/", false), ("/", true), ("/a", true)] {
            assert_eq!(name(folder(2, path, empty)), None);
        }
        assert_eq!(name(folder(3, "/a", true)), None);
        assert_eq!(name(folder(3, "/", true)), None);
        assert_eq!(name(folder(4, "/", true)), named("3", ""));
    }

    #[test]
    fn only_the_kubelets_tmpfs_is_looked_at() {
        with_own_mounts(|| {
            let place = tempfile::tempdir().unwrap();
            let volume = place.path().join("kubernetes.io~empty-dir/cache");
            std::fs::create_dir_all(&volume).unwrap();
            let memory = GuestMemory::default();
            let of = |path: &Path| memory.of(&HostMounts::default(), path).unwrap();
            assert_eq!(of(&volume), None);
            let options = Some("size=1m,mode=2770,uid=5,gid=6,nr_inodes=100");
            mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), options).unwrap();
            let found = of(&volume);
            umount2(&volume, MntFlags::MNT_DETACH).unwrap();
            let found = found.unwrap();
            assert_eq!((found.mode, found.uid, found.gid), (0o2770, 5, 6));
            assert_eq!((found.size, found.files, found.name.as_str()), (1 << 20, 100, "0"));
            assert_eq!(of(Path::new("/dev/shm")), None);
        });
    }

    #[test]
    fn shared_memory_is_known_by_its_owners_name() {
        for (path, known) in [
            ("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/c1/shm", true),
            ("/var/lib/docker/containers/c1/mounts/shm", true),
            ("/var/lib/docker/containers/c2/mounts/shm", false),
            ("/data/c1/shm/x", false),
            ("/data/shm", false),
        ] {
            assert_eq!(is_shared_memory(Path::new(path), "c1"), known, "{path}");
        }
    }
}
