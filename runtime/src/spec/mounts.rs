//! `mounts`: file systems of the kernel's are the guest's; binds go through the shared folder.

use std::io;
use std::path::{Path, PathBuf};

use husk_agent_protocols::{MEMORY_VOLUMES_PATH, SHARED_MEMORY_PATH};
use oci_spec::runtime::Mount;

use super::Membership;
use super::error::{SpecError, refused};
use super::translate::some;
use crate::resource::{Volume, VolumeKind, is_bind, is_shared_memory};

/// File systems that the guest's kernel makes itself.
const GUEST_KINDS: [&str; 8] =
    ["proc", "sysfs", "devpts", "tmpfs", "mqueue", "cgroup", "cgroup2", "ramfs"];

/// Devices every container has; a bind of one is a bind of the guest's own.
const GUEST_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Options of a bind that are carried out on the host.
const HOST_OPTIONS: [&str; 10] =
    ["ro", "rw", "rro", "rrw", "bind", "rbind", "private", "rprivate", "slave", "rslave"];

/// What /dev/shm gets when it was to be shared with the host.
const SHM_OPTIONS: [&str; 5] = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];

/// What a procfs of the guest's gets that is in the place of one of the host's.
const PROCFS_OPTIONS: [&str; 3] = ["nosuid", "nodev", "noexec"];

/// Translates the list in place and returns what has to be bound, with its number in the list. `sandbox` is
/// the id of the container's sandbox.
pub(super) fn translate(
    mounts: &mut [Mount],
    membership: Membership,
    sandbox: &str,
    look: impl Fn(&Path) -> io::Result<VolumeKind>,
) -> Result<Vec<(usize, Volume)>, SpecError> {
    let mut volumes = Vec::new();
    for (number, mount) in mounts.iter_mut().enumerate() {
        let field = format!("mounts[{number}]");
        if some(mount.uid_mappings()) || some(mount.gid_mappings()) {
            return Err(refused(field, "mounts with id mappings"));
        }
        if !is_bind(mount) {
            match mount.typ().as_deref() {
                Some(kind) if GUEST_KINDS.contains(&kind) => continue,
                Some("shm") => mount.set_typ(Some("tmpfs".to_owned())),
                kind => {
                    let kind = kind.unwrap_or("none");
                    let reason =
                        format!("a mount of type {kind}; mount it on the host and bind the folder");
                    return Err(refused(field, reason));
                }
            };
            continue;
        }
        if mount.source().iter().any(|source| source.starts_with(MEMORY_VOLUMES_PATH)) {
            // A folder of the host's that has become memory of the guest's.
            let options = mount.options().clone().unwrap_or_default();
            mount.set_typ(Some("bind".to_owned()));
            mount.set_options(Some(options.into_iter().filter_map(for_guest).collect()));
            continue;
        }
        if mount.destination() == Path::new("/dev/shm") && is_engines(mount, membership, sandbox) {
            // Memory of the host's cannot be shared with processes in another kernel.
            if membership != Membership::Alone {
                mount.set_source(Some(SHARED_MEMORY_PATH.into()));
                mount.set_typ(Some("bind".to_owned()));
                continue;
            }
            mount.set_typ(Some("tmpfs".to_owned()));
            mount.set_source(Some("shm".into()));
            mount.set_options(Some(SHM_OPTIONS.map(str::to_owned).to_vec()));
            continue;
        }
        if let Some(volume) = bind(mount, &field, &look)? {
            mount.set_typ(Some("bind".to_owned()));
            volumes.push((number, volume));
        }
    }
    Ok(volumes)
}

/// The mounts that put a procfs of the guest's in the place of each of the host's that the volume of the
/// bind `mount` has at `places`. A program in the host's tree (`chroot /host findmnt`) looks for itself
/// there, and on the host the process that looks is the file server.
pub(super) fn own_procfs(mount: &Mount, places: &[PathBuf]) -> Vec<Mount> {
    let mut access = mount.options().iter().flatten().filter(|o| matches!(o.as_str(), "ro" | "rw"));
    let read_only = access.next_back().is_some_and(|option| option == "ro");
    let options: Vec<_> = PROCFS_OPTIONS.into_iter().chain(read_only.then_some("ro")).collect();
    let own = |place: &PathBuf| {
        let mut own = Mount::default();
        own.set_destination(mount.destination().join(place));
        own.set_typ(Some("proc".to_owned()));
        own.set_source(Some("proc".into()));
        own.set_options(Some(options.iter().map(|&option| option.to_owned()).collect()));
        own
    };
    places.iter().map(own).collect()
}

/// Whether a bind on `/dev/shm` is what the engine has laid out for the sandbox, and not a volume.
fn is_engines(mount: &Mount, membership: Membership, sandbox: &str) -> bool {
    let is_host = |source: &Path| source == Path::new("/dev/shm");
    let source = mount.source().as_deref();
    membership == Membership::Sandbox
        || source.is_some_and(|source| is_host(source) || is_shared_memory(source, sandbox))
}

/// The volume behind a bind; none if it is a device of the guest's.
fn bind(
    mount: &mut Mount,
    field: &str,
    look: impl Fn(&Path) -> io::Result<VolumeKind>,
) -> Result<Option<Volume>, SpecError> {
    let path = mount.source().clone().ok_or_else(|| refused(field, "a bind without a source"))?;
    let options = mount.options().clone().unwrap_or_default();
    if let Some(shared) = options.iter().find(|o| matches!(o.as_str(), "shared" | "rshared")) {
        let reason = format!("{shared}: mounts made in the guest cannot reach the host");
        return Err(refused(field, reason));
    }
    let kind = look(&path).map_err(|source| SpecError::Source {
        field: field.to_owned(),
        path: path.clone(),
        source,
    })?;
    match kind {
        VolumeKind::Folder | VolumeKind::File => {}
        VolumeKind::Device if GUEST_DEVICES.iter().any(|device| path == Path::new(device)) => {
            return Ok(None);
        }
        VolumeKind::Device => {
            let reason = format!("{} is a device of the host's", path.display());
            return Err(refused(field, reason));
        }
        VolumeKind::Endpoint => {
            let reason = format!(
                "{} is a socket or FIFO; its other end is out of the guest's reach",
                path.display()
            );
            return Err(refused(field, reason));
        }
    }
    // On the host only what protects the host, and which mounts there are: the rest is the guest's
    // business.
    let volume = options.iter().filter(|option| HOST_OPTIONS.contains(&option.as_str())).cloned();
    let volume = Volume { source: path, options: volume.collect() };
    mount.set_options(Some(options.into_iter().filter_map(for_guest).collect()));
    Ok(Some(volume))
}

/// The option as the guest's mount has it. Mounts beneath are the guest's own, made when a path first
/// leads into them, and with the flags of the one above.
fn for_guest(option: String) -> Option<String> {
    match option.as_str() {
        "rro" => Some("ro".to_owned()),
        "rrw" => None,
        _ => Some(option),
    }
}
