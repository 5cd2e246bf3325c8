//! The cgroup on the host in which a sandbox's processes are counted and limited.
//!
//! It is the one that the first container's spec names; its limits are its parents', such as those
//! that the kubelet gives a pod. What the spec limits is limited in the guest.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Cpuset;

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// A file that only v2's hierarchy has.
const CONTROLLERS: &str = "cgroup.controllers";

/// Files of a cpuset: CPUs and memory nodes. v1's must be filled before a process can be put there.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// How often, and how far apart, a cgroup is tried to be removed whose last processes still end.
const LAST_PROCESSES: usize = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// Errors of putting the sandbox into its cgroup, and of limiting it there.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The cgroup could not be made or entered.
    #[error("cannot put the sandbox into the cgroup {path}")]
    Enter {
        /// The cgroup.
        path: PathBuf,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// A file of it could not be filled.
    #[error("cannot set {path} to {value:?}")]
    Set {
        /// The file.
        path: PathBuf,
        /// The text for it.
        value: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
}

/// A cgroup that holds a sandbox's processes, in every hierarchy.
#[derive(Debug)]
pub struct HostCgroup {
    hierarchies: Vec<Hierarchy>,
}

#[derive(Debug)]
struct Hierarchy {
    mount: PathBuf,
    path: PathBuf,
    /// Where this process came from.
    home: PathBuf,
}

impl HostCgroup {
    /// The cgroup that a spec calls `name`; nothing is made yet.
    pub fn of(name: &str) -> Result<Self, CgroupError> {
        let below = path_of(name);
        let own = std::fs::read_to_string("/proc/self/cgroup");
        let own = own.map_err(|source| CgroupError::Enter { path: below.clone(), source })?;
        if below.as_os_str().is_empty() {
            // The root is nobody's own.
            return Ok(Self { hierarchies: Vec::new() });
        }
        let places = hierarchies(Path::new(ROOT), &own)
            .into_iter()
            .map(|(mount, home)| Hierarchy { path: mount.join(&below), mount, home });
        Ok(Self { hierarchies: places.collect() })
    }

    /// Makes it and moves this process there: those that it starts from now on are in it too.
    pub fn enter(&self) -> Result<(), CgroupError> {
        for Hierarchy { mount, path, .. } in &self.hierarchies {
            enter(mount, path)
                .map_err(|source| CgroupError::Enter { path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Lets its processes run on `set` only. What is not named is as above it.
    pub fn confine(&self, set: &Cpuset) -> Result<(), CgroupError> {
        let values = [&set.cpus, &set.mems];
        for Hierarchy { mount, path, .. } in &self.hierarchies {
            for (file, numbers) in CPUSET.iter().zip(values) {
                let value = numbers.as_ref().map(ToString::to_string);
                confine(mount, path, file, value.as_deref()).map_err(|source| {
                    CgroupError::Set {
                        path: path.join(file),
                        value: value.unwrap_or_default(),
                        source,
                    }
                })?;
            }
        }
        Ok(())
    }

    /// For the record.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.hierarchies.iter().map(|one| one.path.clone()).collect()
    }
}

/// Leaves the cgroup and removes it, once no other process is in it.
impl Drop for HostCgroup {
    fn drop(&mut self) {
        for Hierarchy { path, home, .. } in &self.hierarchies {
            let _ = std::fs::write(home.join("cgroup.procs"), "0");
            if std::fs::remove_dir(path).is_ok() {
                continue;
            }
            // One that the kernel does not let go of, though it was killed, keeps no pod from being removed.
            let listed = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            for child in listed.lines().filter(|pid| is_child(pid)) {
                let _ = std::fs::write(home.join("cgroup.procs"), child);
            }
            let _ = std::fs::remove_dir(path);
        }
    }
}

/// Whether the process `pid` is a child of this one: others may be in the cgroup, whose name is a client's.
fn is_child(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    let parent = stat.ok().and_then(|stat| {
        // The program's name, which may contain anything, is in parentheses.
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    });
    parent == Some(std::process::id())
}

/// Removes the cgroup in `folder` after its sandbox's shim: the machine and the file server end when
/// that has ended, but not at once. Nothing is killed by its being there: the name was a client's.
pub fn remove_cgroup(folder: &Path) {
    for _ in 0..LAST_PROCESSES {
        match std::fs::remove_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(PAUSE),
            // Others may have taken it away, or put something there.
            _ => return,
        }
    }
}

fn enter(mount: &Path, path: &Path) -> io::Result<()> {
    let outer: Vec<_> = path.ancestors().take_while(|outer| *outer != mount).collect();
    for folder in outer.into_iter().rev() {
        match std::fs::create_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            result => result?,
        }
        for file in CPUSET {
            // Only v1's are empty at first and have such a file above them.
            let parent = folder.parent().unwrap_or(mount).join(file);
            if !mount.join(CONTROLLERS).exists() && parent.exists() {
                std::fs::write(folder.join(file), std::fs::read(parent)?)?;
            }
        }
    }
    std::fs::write(path.join("cgroup.procs"), "0")
}

/// Fills a file of the cpuset in `path`, in the hierarchy at `mount` if that has this controller.
fn confine(mount: &Path, path: &Path, file: &str, value: Option<&str>) -> io::Result<()> {
    let unified = mount.join(CONTROLLERS).exists();
    if value.is_some() && unified && !path.join(file).exists() {
        let outer: Vec<_> =
            path.ancestors().skip(1).take_while(|outer| outer.starts_with(mount)).collect();
        for folder in outer.into_iter().rev() {
            std::fs::write(folder.join("cgroup.subtree_control"), "+cpuset")?;
        }
    }
    if !path.join(file).exists() {
        return Ok(());
    }
    let text = match value {
        Some(value) => value.to_owned(),
        None if unified => "\n".to_owned(),
        // v1's has to name some.
        None => std::fs::read_to_string(path.parent().unwrap_or(mount).join(file))?,
    };
    std::fs::write(path.join(file), text)
}

/// The mounted hierarchies of `own`, a process's `/proc/<pid>/cgroup`: where each is mounted and
/// where the process is in it.
fn hierarchies(root: &Path, own: &str) -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(home)) = (fields.next(), fields.next()) else { continue };
        let mount = match controllers {
            "" if root.join(CONTROLLERS).exists() => root.to_path_buf(),
            "" => root.join("unified"),
            named => root.join(named.trim_start_matches("name=")),
        };
        if mount.join("cgroup.procs").exists() {
            let home = mount.join(home.trim_start_matches('/'));
            found.push((mount, home));
        }
    }
    found
}

/// The path below a hierarchy's root. systemd's form is `slice:prefix:name`; a slice is inside those
/// that its name begins with.
fn path_of(name: &str) -> PathBuf {
    let parts: Vec<&str> = name.split(':').collect();
    let &[slice, prefix, name] = parts.as_slice() else {
        return plain(name);
    };
    let mut path = PathBuf::new();
    let stem = slice.trim_end_matches(".slice");
    for (at, _) in stem.match_indices('-').filter(|(at, _)| *at > 0) {
        path.push(plain(&format!("{}.slice", &stem[..at])));
    }
    if !stem.is_empty() && stem != "-" {
        path.push(plain(&format!("{stem}.slice")));
    }
    let unit = if name.ends_with(".slice") || prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}-{name}.scope")
    };
    path.join(plain(&unit))
}

/// Without a way up or out.
fn plain(path: &str) -> PathBuf {
    path.split('/').filter(|part| !matches!(*part, "" | "." | "..")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_told_from_strangers() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(is_child(&child.id().to_string()));
        assert!(!is_child("1") && !is_child(&std::process::id().to_string()));
        child.kill().unwrap();
        assert!(is_child(&child.id().to_string()), "until it is reaped");
        child.wait().unwrap();
        assert!(!is_child("") && !is_child(&child.id().to_string()));
    }

    #[test]
    fn names_of_both_drivers_are_understood() {
        for (name, path) in [
            ("/kubepods/burstable/pod1/c", "kubepods/burstable/pod1/c"),
            ("default/../../c", "default/c"),
            ("system.slice:docker:c", "system.slice/docker-c.scope"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:c",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/\
                 cri-containerd-c.scope",
            ),
            (":nerdctl:c", "nerdctl-c.scope"),
            ("-.slice:docker:c", "docker-c.scope"),
        ] {
            assert_eq!(path_of(name), Path::new(path), "{name}");
        }
    }

    #[test]
    fn hierarchies_are_found_where_they_are_mounted() {
        let root = tempfile::tempdir().unwrap();
        for mount in ["cpu,cpuacct", "systemd"] {
            std::fs::create_dir(root.path().join(mount)).unwrap();
            std::fs::write(root.path().join(mount).join("cgroup.procs"), "").unwrap();
        }
        let own = "3:rdma:/\n2:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/x\n";
        let at = |path: &str| root.path().join(path);
        let v1 = [(at("cpu,cpuacct"), at("cpu,cpuacct/a/b")), (at("systemd"), at("systemd/"))];
        assert_eq!(hierarchies(root.path(), own), v1);
        for file in ["cgroup.procs", CONTROLLERS] {
            std::fs::write(at(file), "").unwrap();
        }
        assert_eq!(hierarchies(root.path(), "0::/x\n"), [(at(""), at("x"))]);
    }

    #[test]
    fn a_cpuset_is_filled_in_either_version() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        std::fs::create_dir_all(&path).unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let fill = |value: Option<&str>| {
            confine(root.path(), &path, CPUSET[0], value).unwrap();
        };
        // Another controller's hierarchy of v1.
        fill(Some("1"));
        assert!(!path.join(CPUSET[0]).exists());
        for folder in ["a", "a/b"] {
            std::fs::write(root.path().join(folder).join(CPUSET[0]), "0-3").unwrap();
        }
        fill(Some("1"));
        assert_eq!(read(&path.join(CPUSET[0])), "1");
        fill(None);
        assert_eq!(read(&path.join(CPUSET[0])), "0-3");
        std::fs::write(root.path().join(CONTROLLERS), "").unwrap();
        fill(None);
        assert_eq!(read(&path.join(CPUSET[0])), "\n");
        std::fs::remove_file(path.join(CPUSET[0])).unwrap();
        fill(Some("1"));
        for folder in ["", "a"] {
            assert_eq!(read(&root.path().join(folder).join("cgroup.subtree_control")), "+cpuset");
        }
    }

    #[test]
    fn levels_are_made_with_what_a_cpuset_needs() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        std::fs::write(root.path().join("cpuset.cpus"), "0-3").unwrap();
        enter(root.path(), &path).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("cpuset.cpus")).unwrap(), "0-3");
        assert!(!path.join("cpuset.mems").exists());
        assert_eq!(std::fs::read_to_string(path.join("cgroup.procs")).unwrap(), "0");
    }
}
