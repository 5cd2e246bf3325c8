//! The spec as a whole.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use husk_agent_protocols::SHARE_PATH;
use oci_spec::runtime::{Hook, Hooks, Spec};

use super::error::{SpecError, refuse_if, refused};
use super::membership::sandbox_of;
use super::{Membership, linux, mounts, process};
use crate::container::HostHooks;
use crate::resource::{VOLUMES, Volume, VolumeKind};

/// A container as the guest is to see it, and what the host has to lay into the shared folder.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// With the guest's paths.
    pub spec: Spec,
    /// What is to be bound, and for which of the mounts.
    pub volumes: Vec<(usize, Volume)>,
    /// Parameters of what is the sandbox's: taken out of the spec.
    pub sandbox_sysctls: BTreeMap<String, String>,
    /// What runs on the host.
    pub hooks: HostHooks,
    /// The root file system on the host, for containers that bring no mounts for it.
    pub root: PathBuf,
}

/// Returns what the container is to its sandbox, and that one's id.
fn membership(spec: &Spec, id: &str) -> (Membership, String) {
    let annotations = spec.annotations().clone().unwrap_or_default().into_iter().collect();
    let sandbox = sandbox_of(&annotations).unwrap_or(id).to_owned();
    (Membership::of(id, &annotations), sandbox)
}

/// Translates the spec of container `id`, whose bundle is the folder `bundle`. `look` says what a path
/// on the host is.
pub fn translate(
    mut spec: Spec,
    id: &str,
    bundle: &Path,
    look: impl Fn(&Path) -> io::Result<VolumeKind>,
) -> Result<GuestSpec, SpecError> {
    refuse_if(spec.windows().is_some(), "windows", "Husk runs Linux containers")?;
    refuse_if(spec.solaris().is_some(), "solaris", "Husk runs Linux containers")?;
    refuse_if(spec.zos().is_some(), "zos", "Husk runs Linux containers")?;
    refuse_if(spec.vm().is_some(), "vm", "the machine is set in husk.toml")?;
    let no_users = "user namespaces are not supported; the machine is the boundary";
    refuse_if(some(spec.uid_mappings()), "uidMappings", no_users)?;
    refuse_if(some(spec.gid_mappings()), "gidMappings", no_users)?;
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    let host_root = bundle.join(root.path());
    // Not built anew: what is left out means false here, but read-only to the builder.
    let mut guest_root = root.clone();
    guest_root.set_path(Path::new(SHARE_PATH).join(id).join("rootfs"));
    guest_root.set_readonly(Some(root.readonly().unwrap_or(false)));
    spec.set_root(Some(guest_root));
    let mut hooks = HostHooks::default();
    if let Some(all) = spec.hooks().clone() {
        let (host, guest) = split_hooks(all, &Path::new(SHARE_PATH).join(id).join("rootfs"))?;
        hooks = host;
        spec.set_hooks(guest);
    }
    let mut init = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    process::translate_process(&mut init, "process")?;
    spec.set_process(Some(init));
    let (membership, sandbox) = membership(&spec, id);
    let mut volumes = Vec::new();
    if let Some(list) = spec.mounts_mut() {
        volumes = mounts::translate(list, membership, &sandbox, look)?;
    }
    let mut settings = match spec.linux().clone() {
        Some(settings) => settings,
        // Not the type's default, which is full of settings.
        None => serde_json::from_str("{}").map_err(SpecError::Json)?,
    };
    let sandbox_sysctls = linux::take_sandbox_sysctls(&mut settings, membership);
    linux::translate(&mut settings, id, membership)?;
    spec.set_linux(Some(settings));
    Ok(GuestSpec { spec, volumes, sandbox_sysctls, hooks, root: host_root })
}

/// A volume that was mounted into the shared folder.
#[derive(Debug, Clone, Copy)]
pub struct PlacedVolume<'a> {
    /// The name in the folder of volumes.
    pub name: &'a str,
    /// Whether the host alone keeps it from being written to.
    pub read_only_by_host: bool,
    /// Where a procfs of the host's is in it.
    pub procfs: &'a [PathBuf],
}

impl GuestSpec {
    /// Takes in the volumes that were mounted, in the order of `volumes`. Mounts that are added shift those
    /// after them: the numbers in `volumes` are of no use then.
    pub fn place_volumes<'a>(&mut self, placed: impl IntoIterator<Item = PlacedVolume<'a>>) {
        let folder = Path::new(SHARE_PATH).join(VOLUMES);
        let Some(mounts) = self.spec.mounts_mut() else { return };
        let mut added = 0;
        for ((number, _), placed) in self.volumes.iter().zip(placed) {
            let number = number + added;
            // The number was taken from this list.
            let mount = &mut mounts[number];
            let own = mounts::own_procfs(mount, placed.procfs);
            mount.set_source(Some(folder.join(placed.name)));
            if placed.read_only_by_host {
                let mut options = mount.options().clone().unwrap_or_default();
                options.retain(|option| option != "ro");
                mount.set_options(Some(options));
            }
            added += own.len();
            mounts.splice(number + 1..=number, own);
        }
    }

    /// Refuses parameters of the sandbox's: for containers that join one of another's.
    pub fn refuse_sandbox_sysctls(&self) -> Result<(), SpecError> {
        match self.sandbox_sysctls.keys().next() {
            None => Ok(()),
            Some(name) => {
                let reason = "it belongs to the sandbox; set it there";
                Err(refused(format!("linux.sysctl.{name}"), reason))
            }
        }
    }
}

pub(super) fn some<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// Splits the hooks: those that run on the host, and those that the guest runs, in the container's
/// namespaces. A program that is to prepare those is looked for in the container's root file system:
/// the host's programs are out of the guest's reach.
fn split_hooks(all: Hooks, guest_root: &Path) -> Result<(HostHooks, Option<Hooks>), SpecError> {
    let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
    // `prestart` is deprecated but what Docker still sends.
    #[allow(deprecated)]
    let mut create = list(all.prestart());
    create.extend(list(all.create_runtime()));
    refuse_graphics(&create)?;
    let host = HostHooks { create, started: list(all.poststart()), stopped: list(all.poststop()) };
    let mut inside = list(all.create_container());
    for hook in &mut inside {
        let path = hook.path().strip_prefix("/").unwrap_or(hook.path()).to_path_buf();
        hook.set_path(guest_root.join(path));
    }
    let starting = list(all.start_container());
    if inside.is_empty() && starting.is_empty() {
        return Ok((host, None));
    }
    let mut guest = Hooks::default();
    guest.set_create_container(Some(inside)).set_start_container(Some(starting));
    Ok((host, Some(guest)))
}

/// Refuses the hooks by which `docker run --gpus` and others give a container the host's graphics processors:
/// they look for the container's mounts on the host.
fn refuse_graphics(hooks: &[Hook]) -> Result<(), SpecError> {
    let hook = hooks.iter().find(|hook| {
        let name = hook.path().file_name().map(|name| name.to_string_lossy().into_owned());
        name.is_some_and(|name| name.starts_with("nvidia-container-"))
    });
    match hook {
        None => Ok(()),
        Some(hook) => {
            let reason = "the host's graphics processors are out of the guest's reach; run it without \
                          `--gpus`, or with another runtime";
            Err(refused(format!("the hook {}", hook.path().display()), reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn look(path: &Path) -> io::Result<VolumeKind> {
        match path.to_str().unwrap() {
            "/host/folder" => Ok(VolumeKind::Folder),
            "/host/file" | "/run/pod/shm" => Ok(VolumeKind::File),
            "/host/socket" => Ok(VolumeKind::Endpoint),
            "/dev/null" | "/dev/sda" => Ok(VolumeKind::Device),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn base() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "user": {"uid": 7, "gid": 8, "umask": 18, "additionalGids": [9, 10]},
                "args": ["a b", "c\nd"], "env": ["X=1"], "cwd": "/w",
                "noNewPrivileges": true, "oomScoreAdj": 5,
                "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}],
                "capabilities": {"bounding": ["CAP_CHOWN"], "ambient": ["CAP_KILL"]},
            },
            "hostname": "h",
            "linux": {},
        })
    }

    fn run(spec: Value) -> Result<(Value, GuestSpec), SpecError> {
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let guest = translate(spec, "c1", Path::new("/bundle"), look)?;
        Ok((serde_json::to_value(&guest.spec).unwrap(), guest))
    }

    /// The base with `value` at the JSON pointer `place`.
    fn with(place: &str, value: Value) -> Value {
        let mut spec = base();
        let (parent, name) = place.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        spec
    }

    fn placed(name: &str) -> PlacedVolume<'_> {
        PlacedVolume { name, read_only_by_host: false, procfs: &[] }
    }

    fn refusal(place: &str, value: Value) -> String {
        match run(with(place, value)) {
            Err(error @ SpecError::Refused { .. }) => error.to_string(),
            Err(error @ SpecError::Source { .. }) => error.to_string(),
            other => panic!("{place} was not refused: {:?}", other.map(|(spec, _)| spec)),
        }
    }

    #[test]
    fn what_belongs_to_the_process_is_passed_on() {
        let (spec, guest) = run(base()).unwrap();
        let mut process = spec["process"].clone();
        // What is not named comes after.
        process["rlimits"].as_array_mut().unwrap().truncate(1);
        assert_eq!(process, base()["process"]);
        assert_eq!(spec["hostname"], "h");
        assert_eq!(spec["root"], json!({"path": "/run/husk/share/c1/rootfs", "readonly": true}));
        assert_eq!(guest.root, Path::new("/bundle/rootfs"));
    }

    #[test]
    fn a_root_that_does_not_say_is_writable() {
        let (spec, _) = run(with("/root", json!({"path": "rootfs"}))).unwrap();
        assert_eq!(spec["root"]["readonly"], false);
        let mut bare = base();
        bare.as_object_mut().unwrap().remove("linux");
        let (spec, _) = run(bare).unwrap();
        let linux = spec["linux"].as_object().unwrap();
        let fields: Vec<_> = linux.keys().collect();
        assert_eq!(fields, ["cgroupsPath", "namespaces"]);
    }

    #[test]
    fn labels_of_the_hosts_security_modules_are_ignored() {
        let (spec, _) = run(with("/process/apparmorProfile", json!("x"))).unwrap();
        assert_eq!(spec["process"].get("apparmorProfile"), None);
        let (spec, _) = run(with("/process/selinuxLabel", json!("x"))).unwrap();
        assert_eq!(spec["process"].get("selinuxLabel"), None);
        let (spec, _) = run(with("/linux/mountLabel", json!("x"))).unwrap();
        assert_eq!(spec["linux"].get("mountLabel"), None);
    }

    #[test]
    fn namespaces_are_fresh_ones_of_the_guests() {
        let namespaces = json!([
            {"type": "network", "path": "/var/run/netns/x"},
            {"type": "ipc", "path": "/proc/5/ns/ipc"},
            {"type": "mount"},
        ]);
        let (spec, _) = run(with("/linux/namespaces", namespaces)).unwrap();
        let expected = json!([
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "cgroup"},
        ]);
        assert_eq!(spec["linux"]["namespaces"], expected);
        assert_eq!(spec["linux"]["cgroupsPath"], "/husk/c1");
        for kind in ["user", "time"] {
            let text = refusal("/linux/namespaces", json!([{"type": kind}]));
            assert!(text.starts_with("linux.namespaces[0] is not supported"), "{text}");
        }
    }

    #[test]
    fn containers_of_a_pod_share_what_they_ask_for() {
        let mut spec = base();
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pod",
        });
        spec["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "ipc", "path": "/proc/5/ns/ipc"}, {"type": "mount"},
        ]);
        spec["mounts"] = json!([
            {"destination": "/dev/shm", "type": "bind", "source": "/run/pod/shm",
             "options": ["rbind", "ro"]},
        ]);
        let (member, _) = run(spec.clone()).unwrap();
        let own = json!([{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]);
        assert_eq!(member["linux"]["namespaces"], own);
        let shm = json!({"destination": "/dev/shm", "type": "bind", "source": "/run/husk/shm",
            "options": ["rbind", "ro"]});
        assert_eq!(member["mounts"][0], shm);

        spec["linux"]["namespaces"][0]["path"] = json!("/proc/5/ns/pid");
        let (member, _) = run(spec.clone()).unwrap();
        assert_eq!(member["linux"]["namespaces"][1]["path"], "/run/husk/pid");

        spec["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
        spec["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "pid"}]);
        spec["linux"]["sysctl"] = json!({"kernel.shmmax": "1", "net.core.somaxconn": "2"});
        let (first, guest) = run(spec).unwrap();
        assert_eq!(first["linux"]["namespaces"], own);
        assert_eq!(guest.sandbox_sysctls.len(), 2);
        assert_eq!(first["linux"]["sysctl"], json!({}));
    }

    #[test]
    fn binds_go_through_the_share_and_the_rest_is_passed_on() {
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=64m"]},
            {"destination": "/f", "type": "bind", "source": "/host/file", "options": ["ro"]},
            {"destination": "/d", "type": "none", "source": "/host/folder", "options": ["rbind"]},
            {"destination": "/mask", "type": "bind", "source": "/dev/null"},
        ]);
        let (_, mut guest) = run(with("/mounts", mounts.clone())).unwrap();
        let sources: Vec<_> = guest.volumes.iter().map(|(_, volume)| &volume.source).collect();
        assert_eq!(sources, [Path::new("/host/file"), Path::new("/host/folder")]);
        assert_eq!(guest.volumes[0].1.options, ["ro"]);
        guest.place_volumes(["8-1-2/7", "0"].map(placed));
        let spec = serde_json::to_value(&guest.spec).unwrap();
        assert_eq!(spec["mounts"][0], mounts[0]);
        assert_eq!(spec["mounts"][1], mounts[1]);
        assert_eq!(spec["mounts"][2]["source"], "/run/husk/share/.volumes/8-1-2/7");
        assert_eq!(spec["mounts"][3]["source"], "/run/husk/share/.volumes/0");
        assert_eq!(spec["mounts"][4]["source"], "/dev/null");
    }

    #[test]
    fn a_procfs_beneath_a_volume_is_the_guests() {
        let mounts = json!([
            {"destination": "/a", "type": "bind", "source": "/host/folder", "options": ["rbind", "ro"]},
            {"destination": "/b", "type": "bind", "source": "/host/folder", "options": ["rbind"]},
            {"destination": "/a/proc", "type": "bind", "source": "/host/file"},
        ]);
        let (_, mut guest) = run(with("/mounts", mounts)).unwrap();
        let procfs = ["proc".into(), "srv/x y/proc".into()];
        let (one, other) = (&procfs[..1], &procfs[..]);
        guest.place_volumes([
            PlacedVolume { procfs: one, read_only_by_host: true, ..placed("0") },
            PlacedVolume { procfs: other, ..placed("1") },
            placed("2"),
        ]);
        let spec = serde_json::to_value(&guest.spec).unwrap();
        let list: Vec<_> = spec["mounts"].as_array().unwrap().iter().collect();
        let places: Vec<_> = list.iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(places, ["/a", "/a/proc", "/b", "/b/proc", "/b/srv/x y/proc", "/a/proc"]);
        let own = json!({"destination": "/a/proc", "type": "proc", "source": "proc",
            "options": ["nosuid", "nodev", "noexec", "ro"]});
        assert_eq!(list[1], &own);
        assert_eq!(list[3]["options"], json!(["nosuid", "nodev", "noexec"]));
        assert_eq!(list[5]["source"], "/run/husk/share/.volumes/2");
    }

    #[test]
    fn shared_memory_is_the_guests_own() {
        let mounts = json!([
            {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
             "options": ["rbind", "ro"]},
        ]);
        let (spec, guest) = run(with("/mounts", mounts)).unwrap();
        assert_eq!(spec["mounts"][0]["type"], "tmpfs");
        assert!(guest.volumes.is_empty());
    }

    #[test]
    fn a_volume_on_shared_memory_is_that_volume() {
        let volume = json!({"destination": "/dev/shm", "type": "bind", "source": "/host/folder"});
        let member = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pod",
        });
        for annotations in [json!({}), member] {
            let mut spec = with("/mounts", json!([volume]));
            spec["annotations"] = annotations;
            let (spec, guest) = run(spec).unwrap();
            assert_eq!(spec["mounts"][0]["type"], "bind");
            assert_eq!(guest.volumes[0].1.source, Path::new("/host/folder"));
        }
    }

    #[test]
    fn a_volume_that_has_become_the_guests_is_bound_there() {
        let mounts = json!([{"destination": "/dev/shm", "type": "none",
            "source": "/run/husk/memory/3", "options": ["rbind", "rro"]}]);
        let (spec, guest) = run(with("/mounts", mounts)).unwrap();
        let bound = json!({"destination": "/dev/shm", "type": "bind",
            "source": "/run/husk/memory/3", "options": ["rbind", "ro"]});
        assert_eq!(spec["mounts"][0], bound);
        assert!(guest.volumes.is_empty());
    }

    #[test]
    fn graphics_processors_are_refused_by_name() {
        for kind in ["prestart", "createRuntime"] {
            let hook = json!({ kind: [{ "path": "/usr/bin/nvidia-container-runtime-hook" }] });
            let text = refusal("/hooks", hook);
            assert!(text.contains("nvidia-container-runtime-hook") && text.contains("--gpus"));
        }
    }

    #[test]
    fn mounts_that_cannot_be_are_refused() {
        for (mount, part) in [
            (json!({"destination": "/x", "type": "bind", "source": "/host/socket"}), "socket"),
            (json!({"destination": "/x", "type": "bind", "source": "/dev/sda"}), "device"),
            (json!({"destination": "/x", "type": "bind", "source": "/host/none"}), "cannot use"),
            (json!({"destination": "/x", "type": "nfs", "source": "h:/x"}), "nfs"),
            (
                json!({"destination": "/x", "type": "bind", "source": "/host/folder",
                       "options": ["rbind", "rshared"]}),
                "rshared",
            ),
            (
                json!({"destination": "/x", "type": "bind", "source": "/host/folder",
                       "uidMappings": [{"hostID": 1, "containerID": 1, "size": 1}]}),
                "mappings",
            ),
        ] {
            let text = refusal("/mounts", json!([mount]));
            assert!(text.starts_with("mounts[0]") && text.contains(part), "{text}");
        }
    }

    #[test]
    fn limits_are_passed_on_as_far_as_the_guest_has_them() {
        let resources = json!({
            "memory": {"limit": 1000, "swap": 2000, "reservation": 5, "swappiness": 3},
            "cpu": {"shares": 512, "quota": 5, "period": 6, "cpus": "0-3", "mems": "0"},
            "pids": {"limit": 9},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "blockIO": {"weight": 10},
            "network": {"classID": 0},
            "unified": {"memory.high": "5"},
        });
        let (spec, _) = run(with("/linux/resources", resources)).unwrap();
        let expected = json!({
            "memory": {"limit": 1000, "reservation": 5},
            "cpu": {"shares": 512, "quota": 5, "period": 6},
            "pids": {"limit": 9},
            "unified": {"memory.high": "5"},
        });
        assert_eq!(spec["linux"]["resources"], expected);
    }

    #[test]
    fn limits_the_guest_has_not_are_refused() {
        for (resources, field) in [
            (json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}), "hugepageLimits"),
            (json!({"cpu": {"realtimeRuntime": 1}}), "cpu.realtimeRuntime"),
            (json!({"memory": {"disableOOMKiller": true}}), "memory.disableOOMKiller"),
            (json!({"network": {"classID": 5}}), "network.classID"),
            (json!({"rdma": {"mlx5": {"hcaHandles": 1}}}), "rdma"),
            (
                json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}),
                "blockIO.throttleReadBpsDevice",
            ),
        ] {
            let text = refusal("/linux/resources", resources);
            assert!(text.starts_with(&format!("linux.resources.{field}")), "{text}");
        }
    }

    #[test]
    fn devices_are_the_guests() {
        let zero = json!({"path": "/dev/zero", "type": "c", "major": 1, "minor": 5});
        let disk = json!({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0});
        let (spec, _) = run(with("/linux/devices", json!([zero]))).unwrap();
        assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
        let text = refusal("/linux/devices", json!([zero, disk]));
        assert!(text.starts_with("linux.devices[1] is not supported: /dev/sda"), "{text}");
        // A privileged container lists all of the host's: it gets what the guest has.
        let mut spec = with("/linux/devices", json!([zero, disk]));
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        let (spec, _) = run(spec).unwrap();
        assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn hooks_run_on_the_side_where_they_belong() {
        let hook = |path: &str| json!([{ "path": path }]);
        let hooks = json!({
            "prestart": hook("/1"), "createRuntime": hook("/2"), "poststart": hook("/3"),
            "poststop": hook("/4"), "createContainer": hook("/bin/5"), "startContainer": hook("/6"),
        });
        let (spec, guest) = run(with("/hooks", hooks)).unwrap();
        let inside = json!({
            "createContainer": hook("/run/husk/share/c1/rootfs/bin/5"),
            "startContainer": hook("/6"),
        });
        assert_eq!(spec["hooks"], inside);
        let paths = |hooks: &[Hook]| {
            hooks.iter().map(|hook| hook.path().display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(paths(&guest.hooks.create), ["/1", "/2"]);
        assert_eq!(paths(&guest.hooks.started), ["/3"]);
        assert_eq!(paths(&guest.hooks.stopped), ["/4"]);
        let (spec, _) = run(with("/hooks", json!({"poststop": hook("/4")}))).unwrap();
        assert_eq!(spec.get("hooks"), None);
    }

    #[test]
    fn what_has_no_meaning_in_a_machine_is_refused() {
        let mapping = json!([{"hostID": 1, "containerID": 1, "size": 1}]);
        for (place, value, field) in [
            ("/linux/uidMappings", mapping.clone(), "linux.uidMappings"),
            ("/linux/gidMappings", mapping, "linux.gidMappings"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
            ("/linux/timeOffsets", json!({"boottime": {"secs": 1}}), "linux.timeOffsets"),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"}),
                "linux.seccomp.listenerPath",
            ),
            ("/process/execCPUAffinity", json!({"initial": "1"}), "process.execCPUAffinity"),
            ("/process/args", json!([]), "process.args"),
        ] {
            let text = refusal(place, value);
            assert!(text.starts_with(&format!("{field} is not supported: ")), "{text}");
        }
    }

    #[test]
    fn seccomp_and_paths_are_passed_whole() {
        let seccomp = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}],
        });
        let mut spec = with("/linux/seccomp", seccomp.clone());
        spec["linux"]["maskedPaths"] = json!(["/proc/kcore"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "5"});
        let (spec, guest) = run(spec).unwrap();
        assert_eq!(spec["linux"]["seccomp"], seccomp);
        assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
        assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
        assert_eq!(spec["linux"]["sysctl"], json!({"kernel.msgmax": "5"}));
        assert_eq!(guest.sandbox_sysctls["net.ipv4.ip_forward"], "1");
        let text = guest.refuse_sandbox_sysctls().unwrap_err().to_string();
        assert!(text.starts_with("linux.sysctl.net.ipv4.ip_forward is not"), "{text}");
    }
}
