//! The sandboxes there are.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

use crate::resource::VOLUMES;
use crate::state::{ProcessRecord, Record, stat};

/// How a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// Its shim is there; the machine is on its way.
    Starting,
    /// Shim, machine and file server are there.
    Running,
    /// Not all of them are there any more; containerd will clear up.
    Broken,
}

impl fmt::Display for SandboxState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Broken => "broken",
        })
    }
}

/// A sandbox as its processes show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxView {
    /// containerd's namespace.
    pub namespace: String,
    /// Its name.
    pub id: String,
    /// How it is.
    pub state: SandboxState,
    /// Its containers' names.
    pub containers: Vec<String>,
    /// Since its shim was started.
    pub age: Duration,
    /// Bytes of the host's memory, shared ones by their share.
    pub memory: u64,
    /// Time on the host's processors.
    pub cpu: Duration,
}

/// Every sandbox below `root`, by name.
pub fn list(root: &Path) -> io::Result<Vec<SandboxView>> {
    let mut found = Vec::new();
    for namespace in folders(root)? {
        for id in folders(&root.join(&namespace))? {
            let folder = root.join(&namespace).join(&id);
            // One that goes while it is looked at is not there.
            if let Ok(Some(record)) = Record::read(&folder) {
                found.push(view(&namespace, id, &folder, &record));
            }
        }
    }
    Ok(found)
}

fn view(namespace: &str, id: String, folder: &Path, record: &Record) -> SandboxView {
    let uses: Vec<Use> = record.processes.iter().filter_map(Use::of).collect();
    let all = uses.len() == record.processes.len();
    let state = match record.processes.len() {
        _ if !all => SandboxState::Broken,
        0 | 1 => SandboxState::Starting,
        _ => SandboxState::Running,
    };
    let mut containers = folders(&folder.join("share")).unwrap_or_default();
    containers.retain(|name| name != VOLUMES);
    SandboxView {
        namespace: namespace.to_owned(),
        id,
        state,
        containers,
        age: uses.iter().map(|one| one.age).max().unwrap_or_default(),
        memory: uses.iter().map(|one| one.memory).sum(),
        cpu: uses.iter().map(|one| one.cpu).sum(),
    }
}

fn folders(path: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<_> = entries.flatten().filter(folder).map(name).collect();
    names.sort();
    Ok(names)
}

/// What one process uses.
struct Use {
    age: Duration,
    memory: u64,
    cpu: Duration,
}

impl Use {
    /// None if it is another process by now, or none.
    fn of(process: &ProcessRecord) -> Option<Self> {
        process.open()?;
        let [user, system] = stat(process.pid, [14, 15])?;
        let ticks = |count: u64| {
            let second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
            Duration::from_millis(count * 1000 / second.unsigned_abs().max(1))
        };
        let up = fs::read_to_string("/proc/uptime").ok()?;
        let up: f64 = up.split(' ').next()?.parse().ok()?;
        let age = Duration::try_from_secs_f64(up).ok()?.saturating_sub(ticks(process.started));
        let cpu = ticks(user + system);
        Some(Self { age, memory: memory(process.pid), cpu })
    }
}

/// Bytes, 0 where the kernel does not say.
fn memory(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(root: &Path, id: &str, processes: Vec<ProcessRecord>) {
        let folder = root.join("ns").join(id);
        fs::create_dir_all(folder.join("share").join(VOLUMES)).unwrap();
        fs::create_dir(folder.join("share/c1")).unwrap();
        Record { processes, socket: None, cgroups: Vec::new(), network: None }
            .write(&folder)
            .unwrap();
    }

    #[test]
    fn sandboxes_are_told_by_their_processes() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(list(&root.path().join("none")).unwrap(), []);
        let own = ProcessRecord::of(std::process::id()).unwrap();
        let gone = ProcessRecord { pid: own.pid, started: own.started + 1 };
        sandbox(root.path(), "a", vec![own, own, own]);
        sandbox(root.path(), "b", vec![own]);
        sandbox(root.path(), "c", vec![own, gone]);
        fs::create_dir_all(root.path().join("ns/without-a-record")).unwrap();
        let seen = list(root.path()).unwrap();
        let states: Vec<_> = seen.iter().map(|view| (view.id.as_str(), view.state)).collect();
        let (starting, running) = (SandboxState::Starting, SandboxState::Running);
        assert_eq!(states, [("a", running), ("b", starting), ("c", SandboxState::Broken)]);
        assert_eq!(seen[0].containers, ["c1"]);
        assert_eq!(seen[0].namespace, "ns");
        assert!(seen[0].memory > seen[1].memory && seen[1].memory > 0);
        assert!(seen[0].age < Duration::from_secs(3600));
    }
}
