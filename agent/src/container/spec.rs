//! From the spec as the runtime sends it to the one that libcontainer gets.
//!
//! The runtime has translated paths already. What is left is what only the guest knows, or where
//! libcontainer differs from runc:
//! - the cgroup is ours; of the hooks only those that run in the container's namespaces are here;
//! - AppArmor, SELinux and RDT are the host's: the guest's kernel has none of them;
//! - devices keep their path but get the guest's numbers for it, if it has the path; those the guest has not are left out, and
//!   so are limits on huge pages of sizes that it has not;
//! - `rootfsPropagation: rslave`, which engines write for a volume that gets later mounts, is `slave` there;
//! - `noNewPrivileges: false` is removed: libcontainer would load the seccomp filter too late;
//! - the environment goes past libcontainer (its order and repeated names would be lost), and so
//!   does the working directory where it must be made inside a mount.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use husk_agent_protocols::SANDBOX_PID_NAMESPACE;
use nix::sys::stat::{major, minor};
use oci_spec::runtime::{
    Hooks, Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, Mount, Process, Spec,
};

use crate::container::cgroup::Cgroup;

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not the JSON of a spec.
    #[error("not readable: {0}")]
    Json(#[source] serde_json::Error),
    /// Something needed is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{0}")]
    Invalid(&'static str),
}

/// What the making of a container needs.
#[derive(Debug)]
pub struct Plan {
    /// For libcontainer.
    pub spec: Spec,
    /// The command's environment.
    pub environment: Vec<String>,
    /// The command's user.
    pub uid: u32,
    /// A working directory below a guest directory, to be made before libcontainer works.
    pub early_directory: Option<(PathBuf, PathBuf)>,
    /// A working directory to be made and entered inside the container.
    pub late_directory: Option<PathBuf>,
    /// Whether the container has a new network namespace.
    pub new_network: bool,
    /// Whether the container's PID namespace is not its own.
    pub shared_pids: bool,
}

/// Reads a spec.
pub fn read(json: &[u8]) -> Result<Spec, SpecError> {
    serde_json::from_slice(json).map_err(SpecError::Json)
}

/// Reads limits.
pub fn read_limits(json: &[u8]) -> Result<LinuxResources, SpecError> {
    serde_json::from_slice(json).map_err(SpecError::Json)
}

/// Checks what both kinds of process must have.
pub fn check_process(process: &Process, terminal: bool) -> Result<(), SpecError> {
    let args = process.args().as_ref().filter(|args| !args.is_empty());
    let args = args.ok_or(SpecError::Missing("process.args"))?;
    let environment = process.env().iter().flatten();
    if args.iter().chain(environment).any(|text| text.contains('\0')) {
        return Err(SpecError::Invalid("process.args and process.env cannot hold NUL"));
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::Invalid("process.cwd must be an absolute path"));
    }
    if process.terminal().unwrap_or(false) != terminal {
        return Err(SpecError::Invalid("process.terminal differs from the streams' terminal"));
    }
    Ok(())
}

/// Adapts `spec` for a container in `cgroup`.
pub fn adapt(
    mut spec: Spec,
    cgroup: &Cgroup,
    terminal: bool,
    sandbox_pid: Option<u32>,
) -> Result<Plan, SpecError> {
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?.path().clone();
    if !root.is_absolute() {
        return Err(SpecError::Invalid("root.path must be an absolute path"));
    }
    let mounts = spec.mounts().clone().unwrap_or_default();
    if let Some(hooks) = spec.hooks().clone() {
        let mut inside = Hooks::default();
        inside.set_create_container(hooks.create_container().clone());
        inside.set_start_container(hooks.start_container().clone());
        spec.set_hooks(Some(inside));
    }

    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    let has_cgroup_mount = mounts.iter().any(|m| m.typ().as_deref() == Some("cgroup"));
    adapt_linux(&mut linux, cgroup, has_cgroup_mount)?;
    join_pids(&mut linux, sandbox_pid)?;
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let find = |kind| namespaces.iter().find(|n| n.typ() == kind);
    if find(LinuxNamespaceType::Mount).is_none() {
        return Err(SpecError::Invalid("linux.namespaces needs a mount namespace"));
    }
    if find(LinuxNamespaceType::Uts).is_none() {
        // The sandbox's name, which all its containers share, was set when it started.
        spec.set_hostname(None).set_domainname(None);
    }
    let new_network = find(LinuxNamespaceType::Network).is_some_and(|n| n.path().is_none());
    let shared_pids = find(LinuxNamespaceType::Pid).is_none_or(|n| n.path().is_some());
    spec.set_linux(Some(linux));

    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    check_process(&process, terminal)?;
    let environment = process.env().clone().unwrap_or_default();
    // Or libcontainer would look the user up through the container's name service switch.
    process.set_env(Some(vec!["HOME=/".to_owned()]));
    process.set_apparmor_profile(None).set_selinux_label(None);
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    let (mut early_directory, mut late_directory) = (None, None);
    match place(&clean(process.cwd()), &root, &mounts) {
        Place::Guest(base, rest) => early_directory = Some((base, rest)),
        Place::Container(path) => {
            process.set_cwd("/".into());
            late_directory = Some(path);
        }
    }
    let uid = process.user().uid();
    spec.set_process(Some(process));
    Ok(Plan { spec, environment, uid, early_directory, late_directory, new_network, shared_pids })
}

/// Whether a container asks for the PID namespace that others share.
pub fn shares_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(is_sandbox_pids)
}

fn is_sandbox_pids(namespace: &LinuxNamespace) -> bool {
    namespace.path().as_deref() == Some(Path::new(SANDBOX_PID_NAMESPACE))
}

/// Puts the PID namespace that the sandbox's containers share in the place of its name.
fn join_pids(linux: &mut Linux, sandbox_pid: Option<u32>) -> Result<(), SpecError> {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        if is_sandbox_pids(namespace) {
            let pid = sandbox_pid.ok_or(SpecError::Invalid(
                "the sandbox's own container, whose PID namespace is to be shared, does not run",
            ))?;
            namespace.set_path(Some(format!("/proc/{pid}/ns/pid").into()));
        }
    }
    linux.set_namespaces(Some(namespaces));
    Ok(())
}

fn adapt_linux(linux: &mut Linux, cgroup: &Cgroup, mounted: bool) -> Result<(), SpecError> {
    linux.set_cgroups_path(Some(cgroup.name()));
    linux.set_intel_rdt(None).set_mount_label(None);
    if let Some(name) = linux.rootfs_propagation().as_deref().and_then(recursive_propagation) {
        linux.set_rootfs_propagation(Some(name.to_owned()));
    }
    if let Some(limits) =
        linux.resources_mut().as_mut().and_then(|r| r.hugepage_limits_mut().as_mut())
    {
        limits.retain(|limit| has_huge_pages(limit.page_size()));
    }
    let devices = linux.devices().iter().flatten().filter_map(guest_device).collect();
    linux.set_devices(Some(devices));
    let mut namespaces: Vec<LinuxNamespace> = linux.namespaces().clone().unwrap_or_default();
    if mounted && !namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Cgroup) {
        // The host may have cgroup v1, where specs have no such namespace; the guest has v2, and
        // without the namespace the container would see and reach the whole tree.
        let builder = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup);
        namespaces.push(builder.build().map_err(|_| SpecError::Invalid("linux.namespaces"))?);
    }
    linux.set_namespaces(Some(namespaces));
    Ok(())
}

/// The propagation that libcontainer always sets recursively, if `name` asks for it by the name that engines
/// use; libcontainer knows the other.
fn recursive_propagation(name: &str) -> Option<&str> {
    let known = ["shared", "slave", "private", "unbindable"];
    name.strip_prefix('r').filter(|name| known.contains(name))
}

/// Whether the guest has huge pages of `size`, such as `2MB`.
fn has_huge_pages(size: &str) -> bool {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &size[digits.len()..] {
        "KB" => 1,
        "MB" => 1 << 10,
        "GB" => 1 << 20,
        _ => return false,
    };
    let kib = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(scale));
    let folder = |kib| format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB");
    kib.is_some_and(|kib| Path::new(&folder(kib)).exists())
}

/// The device as the guest has it, if it does.
fn guest_device(device: &LinuxDevice) -> Option<LinuxDevice> {
    let mut device = device.clone();
    if device.typ() == LinuxDeviceType::P {
        return Some(device);
    }
    let Ok(metadata) = std::fs::symlink_metadata(device.path()) else {
        // Under another name: the runtime lets through only numbers that mean the same here.
        let numbers = format!("/sys/dev/char/{}:{}", device.major(), device.minor());
        let known = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U)
            && Path::new(&numbers).exists();
        return known.then_some(device);
    };
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return None,
    };
    let number = |n: u64| i64::try_from(n).ok();
    device.set_typ(kind);
    device.set_major(number(major(metadata.rdev()))?);
    device.set_minor(number(minor(metadata.rdev()))?);
    Some(device)
}

enum Place {
    /// Below a directory of the guest.
    Guest(PathBuf, PathBuf),
    /// Only in the container, once its mounts are there.
    Container(PathBuf),
}

/// Where the working directory can be made: below the deepest mount that covers it.
fn place(directory: &Path, root: &Path, mounts: &[Mount]) -> Place {
    let covering = mounts
        .iter()
        .map(|mount| (clean(mount.destination()), mount))
        .filter(|(destination, _)| directory.starts_with(destination))
        .max_by_key(|(destination, _)| destination.components().count());
    let Some((destination, mount)) = covering else {
        return Place::Guest(root.to_owned(), directory.to_owned());
    };
    let bind = |option: &String| option == "bind" || option == "rbind";
    let is_bind =
        mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind);
    match (mount.source(), directory.strip_prefix(&destination)) {
        (Some(source), Ok(rest)) if is_bind => {
            Place::Guest(source.clone(), Path::new("/").join(rest))
        }
        _ => Place::Container(directory.to_owned()),
    }
}

/// The absolute path without `.` and `..`; symbolic links are not looked at.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "/run/husk/share/c/rootfs"},
            "process": {
                "args": ["sh"], "cwd": "/", "env": ["A=1", "A=2"], "user": {"uid": 5, "gid": 6},
                "noNewPrivileges": false, "apparmorProfile": "cri-containerd.apparmor.d",
            },
            "hooks": {"prestart": [{"path": "/pre"}], "startContainer": [{"path": "/start"}]},
            "hostname": "name",
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "network"}],
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 99, "minor": 99},
                    {"path": "/dev/not-there", "type": "c", "major": 999, "minor": 1},
                    {"path": "/dev/other-name", "type": "c", "major": 1, "minor": 5},
                ],
                "cgroupsPath": "/default/c",
            },
            "mounts": [
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/data", "source": "/run/husk/share/c/mounts/0",
                 "options": ["rbind", "ro"]},
            ],
        });
        change(&mut value);
        serde_json::from_value(value).expect("a spec")
    }

    #[test]
    fn propagation_by_the_names_that_engines_use() {
        assert_eq!(recursive_propagation("rslave"), Some("slave"));
        assert_eq!(recursive_propagation("rprivate"), Some("private"));
        assert_eq!(recursive_propagation("slave"), None);
        assert_eq!(recursive_propagation("rubbish"), None);
    }

    #[test]
    fn the_guest_decides_what_is_the_guests() {
        let plan = adapt(spec(|_| {}), &Cgroup::of("c"), false, None).expect("adapted");
        let linux = plan.spec.linux().as_ref().expect("linux");
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/husk/c")));
        let kinds: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
        assert!(kinds.contains(&LinuxNamespaceType::Cgroup));
        let devices = linux.devices().as_ref().expect("devices");
        let numbers: Vec<_> = devices.iter().map(|d| (d.major(), d.minor())).collect();
        assert_eq!(numbers, [(1, 3), (1, 5)]);
        let process = plan.spec.process().as_ref().expect("process");
        assert_eq!(process.no_new_privileges(), None);
        assert!(process.apparmor_profile().is_none());
        let hooks = serde_json::to_value(plan.spec.hooks()).expect("hooks");
        assert_eq!(hooks, json!({"startContainer": [{"path": "/start"}]}));
        assert!(plan.spec.hostname().is_none());
        assert_eq!(plan.environment, ["A=1", "A=2"]);
        assert!(plan.new_network && plan.shared_pids);
        assert_eq!(plan.uid, 5);
    }

    #[test]
    fn pids_are_shared_with_the_sandboxs_own_container() {
        let shared = json!([{"type": "mount"}, {"type": "pid", "path": "/run/husk/pid"}]);
        let change = |v: &mut Value| v["linux"]["namespaces"] = shared.clone();
        let plan = adapt(spec(change), &Cgroup::of("c"), false, Some(7)).expect("adapted");
        let namespaces = plan.spec.linux().as_ref().and_then(|l| l.namespaces().clone());
        let paths: Vec<_> = namespaces.iter().flatten().filter_map(|n| n.path().clone()).collect();
        assert_eq!(paths, [PathBuf::from("/proc/7/ns/pid")]);
        assert!(plan.shared_pids);
        let alone = adapt(spec(change), &Cgroup::of("c"), false, None).expect_err("refused");
        assert!(alone.to_string().contains("does not run"), "{alone}");
    }

    #[test]
    fn working_directories_are_made_where_they_will_be_seen() {
        let plan = |cwd: &str| {
            let spec = spec(|v| v["process"]["cwd"] = json!(cwd));
            adapt(spec, &Cgroup::of("c"), false, None).expect("adapted")
        };
        let root = PathBuf::from("/run/husk/share/c/rootfs");
        let early = |cwd| plan(cwd).early_directory;
        assert_eq!(early("/new/../work"), Some((root, "/work".into())));
        let source = PathBuf::from("/run/husk/share/c/mounts/0");
        assert_eq!(early("/data/x/y"), Some((source, "/x/y".into())));
        let late = plan("/tmp/x");
        assert_eq!(late.late_directory, Some("/tmp/x".into()));
        assert_eq!(late.spec.process().as_ref().expect("process").cwd(), Path::new("/"));
    }

    #[test]
    fn huge_pages_of_no_size_are_not_limited() {
        for size in ["", "2", "3MB", "xMB", "99999999999999999999GB", "2mb"] {
            assert!(!has_huge_pages(size), "{size}");
        }
    }

    #[test]
    fn bad_specs_are_refused() {
        let refused = |change: fn(&mut Value)| {
            adapt(spec(change), &Cgroup::of("c"), false, None).expect_err("refused").to_string()
        };
        assert_eq!(refused(|v| v["process"]["args"] = json!([])), "process.args is missing");
        assert!(refused(|v| v["process"]["cwd"] = json!("x")).contains("absolute"));
        assert!(refused(|v| v["process"]["terminal"] = json!(true)).contains("terminal"));
        assert!(refused(|v| v["process"]["args"] = json!(["a\u{0}b"])).contains("NUL"));
        assert!(refused(|v| v["linux"]["namespaces"] = json!([])).contains("mount namespace"));
        assert!(refused(|v| v["root"]["path"] = json!("rootfs")).contains("root.path"));
    }
}
