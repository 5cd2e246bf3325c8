//! A container's OCI spec, from the host's point of view to the guest's.
//!
//! What comes out names nothing of the host's: namespaces, the cgroup, the root and the sources of
//! mounts are the guest's, and it reads as it was written.

use std::path::Path;

use husk_agent_protocols::{SANDBOX_PID_NAMESPACE, SHARE_PATH, SHARED_MEMORY_PATH};
use husk_configuration::Configuration;
use husk_runtime::resource::{Limits, MountOptions, SizingRules, VolumeKind};
use husk_runtime::spec::{GuestSpec, PlacedVolume, parse, sandbox_of, translate};
use nix::mount::MsFlags;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};

use crate::json;

/// As containerd writes one for a container of a pod.
pub(crate) const TEMPLATE: &str = include_str!("spec.json");

/// Texts that mean something in a spec.
pub(crate) const WORDS: &[&str] = &[
    "bind",
    "rbind",
    "rshared",
    "ro",
    "tmpfs",
    "shm",
    "cgroup",
    "cgroup2",
    "proc",
    "none",
    "/dev/shm",
    "/dev/null",
    "/dev/sda",
    "/etc",
    "/etc/hosts",
    "/run/husk/pid",
    "..",
    "type",
    "path",
    "source",
    "options",
    "uidMappings",
    "pid",
    "ipc",
    "uts",
    "user",
    "time",
    "mount",
    "network",
    "sandbox",
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri-o.SandboxID",
    "listenerPath",
    "SCMP_ACT_NOTIFY",
    "kernel.shmmax",
    "net/ipv4/ip_forward",
    "c",
    "b",
    "p",
    "a",
    "RLIMIT_AS",
];

const ID: &str = "c1";

/// Devices of the guest's own that may be bound.
const GUEST_DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// The text, or changes to one as containerd writes it.
pub fn run(data: &[u8]) {
    let text = json::text(data, TEMPLATE, WORDS);
    let Ok((spec, _)) = parse(&text) else { return };
    size(&spec);
    let mut guest = match translate(spec, ID, Path::new("/bundle"), VolumeKind::of) {
        Ok(guest) => guest,
        Err(error) => return drop(error.to_string()),
    };
    let names: Vec<String> = (0..guest.volumes.len()).map(|number| number.to_string()).collect();
    let procfs = ["proc".into()];
    guest.place_volumes(names.iter().map(|name| PlacedVolume {
        name,
        read_only_by_host: name.len() > 1,
        procfs: &procfs,
    }));
    check(&guest);
    let _ = guest.refuse_sandbox_sysctls();
    let written = serde_json::to_vec(&guest.spec).expect("JSON");
    let (again, unknown) = parse(&written).expect("what was written can be read");
    assert!(unknown.is_empty(), "{unknown:?}");
    assert_eq!(again, guest.spec);
}

/// Any limits make a machine that can be.
fn size(spec: &Spec) {
    let annotations = spec.annotations().clone().unwrap_or_default().into_iter().collect();
    sandbox_of(&annotations);
    let configuration = Configuration::default();
    let rules = SizingRules::new(&configuration, Limits::of_pod(&annotations));
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let limits: Vec<Limits> = resources.iter().map(|it| Limits::of_container(it)).collect();
    let size = rules.size(&limits);
    let room = rules.room(size);
    assert!((1..=32).contains(&size.vcpus) && (size.vcpus..=32).contains(&room.vcpus));
    assert!(size.memory_mib >= configuration.machine.memory.mib());
    assert!(room.memory_mib >= size.memory_mib);
}

fn check(guest: &GuestSpec) {
    let spec = &guest.spec;
    let own = Path::new(SHARE_PATH).join(ID).join("rootfs");
    assert_eq!(spec.root().as_ref().expect("a root").path(), &own);
    let process = spec.process().as_ref().expect("a process");
    assert!(process.args().as_ref().is_some_and(|args| !args.is_empty()));
    assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
    let linux = spec.linux().as_ref().expect("settings for Linux");
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/husk/c1")));
    for namespace in linux.namespaces().iter().flatten() {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Pid, Uts};
        assert!(matches!(namespace.typ(), Mount | Pid | Ipc | Uts | Cgroup));
        let path = namespace.path().as_deref();
        assert!(path.is_none_or(|path| path == Path::new(SANDBOX_PID_NAMESPACE)));
    }
    for mount in spec.mounts().iter().flatten() {
        check_mount(mount);
    }
    for (_, volume) in &guest.volumes {
        let options = MountOptions::parse(&volume.options).expect("flags and propagation only");
        assert!(options.data.is_empty() && !options.propagation.contains(MsFlags::MS_SHARED));
    }
    let hooks = spec.hooks().clone().unwrap_or_default();
    for hook in hooks.create_container().iter().flatten() {
        assert!(hook.path().starts_with(&own));
    }
    assert!(hooks.create_runtime().is_none() && hooks.poststop().is_none());
}

/// Nothing is bound that the guest has not.
fn check_mount(mount: &Mount) {
    let mut options = mount.options().iter().flatten();
    let binds = options.any(|option| option == "bind" || option == "rbind");
    if !binds && mount.typ().as_deref() != Some("bind") {
        return;
    }
    let source = mount.source().as_deref().expect("a source");
    let good = source.starts_with(Path::new(SHARE_PATH).join(".volumes"))
        || source == Path::new(SHARED_MEMORY_PATH)
        || GUEST_DEVICES.iter().any(|name| source == Path::new("/dev").join(name));
    assert!(good, "{source:?} is bound");
}
