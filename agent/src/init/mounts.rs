//! The guest's mounts.
//!
//! The initramfs cannot be pivoted away from, and containers pivot. So a tmpfs is moved over it
//! and becomes the root, as switch_root does it; the agent's own file stays reachable as
//! `/proc/self/exe`.

use std::fs;
use std::io::Write;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{UnlinkatFlags, chdir, chroot, unlinkat};

/// Where the cgroup v2 tree is.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The cgroup above all containers.
pub const CONTAINERS_CGROUP: &str = "/sys/fs/cgroup/husk";
/// The agent's own state.
pub const STATE: &str = "/run/husk-agent";

/// What containers may be limited in.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// A mount, or what it needs, could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path}: {source}")]
pub struct MountError {
    step: &'static str,
    path: String,
    source: std::io::Error,
}

type Result<T> = std::result::Result<T, MountError>;

trait Step<T> {
    fn step(self, step: &'static str, path: &str) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Step<T> for std::result::Result<T, E> {
    fn step(self, step: &'static str, path: &str) -> Result<T> {
        self.map_err(|e| MountError { step, path: path.to_owned(), source: e.into() })
    }
}

fn directory(path: &str) -> Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e).step("create", path),
        _ => Ok(()),
    }
}

fn filesystem(kind: &str, path: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(kind), path, Some(kind), flags, Some(options)).step("mount", path)
}

/// Moves from the initramfs to a root of our own, with what the agent needs to serve.
pub fn enter_root() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    directory("/root")?;
    filesystem("tmpfs", "/root", MsFlags::MS_NOSUID, "mode=0755")?;
    chdir("/root").step("enter", "/root")?;
    for name in ["dev", "proc", "sys", "run", "tmp", "etc"] {
        directory(name)?;
    }
    filesystem("devtmpfs", "dev", MsFlags::MS_NOSUID, "mode=0755")?;
    filesystem("proc", "proc", quiet, "")?;
    filesystem("sysfs", "sys", quiet, "")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).step("move to", "/")?;
    chroot(".").step("chroot to", "/")?;
    chdir("/").step("enter", "/")?;
    directory(STATE)
}

/// What only containers need: made when the sandbox starts.
pub fn complete() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    directory("/dev/pts")?;
    filesystem("devpts", "/dev/pts", quiet, "gid=5,mode=0620,ptmxmode=0666")?;
    directory("/dev/shm")?;
    filesystem("tmpfs", "/dev/shm", quiet | MsFlags::MS_NODEV, "mode=1777")?;
    filesystem("cgroup2", CGROUP_ROOT, quiet | MsFlags::MS_NODEV, "nsdelegate")
}

/// Makes the cgroup above the containers, with every controller handed down to it.
pub fn containers_cgroup() -> Result<()> {
    directory(CONTAINERS_CGROUP)?;
    hand_down(&[CGROUP_ROOT, CONTAINERS_CGROUP])
}

fn hand_down(cgroups: &[&str]) -> Result<()> {
    let path = format!("{CGROUP_ROOT}/cgroup.controllers");
    let available = fs::read_to_string(&path).step("read", &path)?;
    for controller in CONTROLLERS.iter().filter(|c| available.split_whitespace().any(|a| a == **c))
    {
        for cgroup in cgroups {
            let path = format!("{cgroup}/cgroup.subtree_control");
            fs::write(&path, format!("+{controller}")).step("write", &path)?;
        }
    }
    Ok(())
}

/// Prepares the namespaces of a component test, with a cgroup tree `name` of its own: nothing of it
/// reaches the machine outside, nor another test. The answer is for [`component_leave`].
pub fn component_root(name: &str) -> Result<fs::File> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).step("make private", "/")?;
    filesystem("proc", "/proc", MsFlags::empty(), "")?;
    filesystem("tmpfs", "/run", MsFlags::empty(), "mode=0755")?;
    if !Path::new(CGROUP_ROOT).join("cgroup.controllers").exists() {
        filesystem("cgroup2", CGROUP_ROOT, MsFlags::empty(), "")?;
    }
    hand_down(&[CGROUP_ROOT])?;
    let outside = fs::File::open(CGROUP_ROOT).step("open", CGROUP_ROOT)?;
    let own = format!("{CGROUP_ROOT}/{name}");
    directory(&own)?;
    let processes = format!("{CGROUP_ROOT}/cgroup.procs");
    let mut back = fs::File::options().write(true).open(&processes).step("open", &processes)?;
    fs::write(format!("{own}/cgroup.procs"), "0").step("enter", &own)?;
    unshare(CloneFlags::CLONE_NEWCGROUP).step("unshare", &own)?;
    // A cgroup that hands its controllers down has no processes itself, unless it is the true root.
    back.write_all(b"0").step("leave", &own)?;
    umount2(CGROUP_ROOT, MntFlags::MNT_DETACH).step("unmount", CGROUP_ROOT)?;
    filesystem("cgroup2", CGROUP_ROOT, MsFlags::empty(), "")?;
    directory(STATE)?;
    Ok(outside)
}

/// Takes the component test's cgroup tree away again.
pub fn component_leave(outside: &fs::File, name: &str) -> Result<()> {
    unlinkat(outside, name, UnlinkatFlags::RemoveDir).step("remove the cgroup", name)
}
