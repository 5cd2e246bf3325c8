//! A container's cgroup, and those that it made below its own.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;
use rustix::fs::inotify;
use tokio::io::Interest;

use crate::container::statistics::counters;
use crate::init::calls;
use crate::init::mounts::{CGROUP_ROOT, CONTAINERS_CGROUP};

/// More processes than this are not listed: the answer is one message.
const PROCESS_LIMIT: usize = 32 << 10;
/// How deep a container's own cgroups are followed.
const DEPTH_LIMIT: usize = 32;
/// How long killed processes may take to end; longer only if the kernel is stuck.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long processes may take to stand still.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
const MEMORY_EVENTS: &str = "memory.events";

/// A subtree of cgroups.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The one of the container `id`, a checked id.
    pub fn of(id: &str) -> Self {
        Self { path: Path::new(CONTAINERS_CGROUP).join(id) }
    }

    /// The one above all containers.
    pub fn all() -> Self {
        Self { path: CONTAINERS_CGROUP.into() }
    }

    /// The one of a shell, a checked id, beside those of containers.
    pub fn of_shell(id: &str) -> Self {
        Self { path: Path::new(CGROUP_ROOT).join(format!("shell-{id}")) }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path in the hierarchy, as a spec's `cgroupsPath` says it.
    pub fn name(&self) -> PathBuf {
        // Every constructor begins with the root.
        let below = self.path.strip_prefix(CGROUP_ROOT).unwrap_or(&self.path);
        Path::new("/").join(below)
    }

    /// Makes it, with `devices` to decide on devices.
    pub fn make(&self, devices: Option<&[u64]>) -> io::Result<()> {
        fs::create_dir(&self.path)?;
        match devices {
            Some(program) => {
                husk_bpf::decide_on_devices(fs::File::open(&self.path)?.as_fd(), program)
            }
            None => Ok(()),
        }
    }

    /// Kills every process of the subtree.
    pub fn kill(&self) -> io::Result<()> {
        gone_is_fine(fs::write(self.path.join("cgroup.kill"), "1"))
    }

    /// Sends `signal` to every process of the subtree.
    pub fn signal(&self, signal: u32) -> io::Result<()> {
        if signal == libc::SIGKILL.unsigned_abs() {
            return self.kill();
        }
        let number =
            i32::try_from(signal).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        for pid in self.processes()? {
            match calls::kill(pid.cast_signed(), number) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The processes of the subtree, at most [`PROCESS_LIMIT`].
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect(&self.path, DEPTH_LIMIT, &mut pids)?;
        Ok(pids)
    }

    /// How often the out-of-memory killer has struck in the subtree.
    pub fn out_of_memory(&self) -> u64 {
        fs::read_to_string(self.path.join(MEMORY_EVENTS)).map_or(0, |events| kills(&events))
    }

    /// Waits until the out-of-memory killer has struck more often than `seen`; how often then.
    pub async fn out_of_memory_beyond(&self, seen: u64) -> io::Result<u64> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watch = calls::watch(inotify::init(flags)?, Interest::READABLE)?;
        let events = inotify::WatchFlags::MODIFY;
        inotify::add_watch(watch.get_ref(), self.path.join(MEMORY_EVENTS), events)?;
        loop {
            let kills = kills(&fs::read_to_string(self.path.join(MEMORY_EVENTS))?);
            if kills > seen {
                return Ok(kills);
            }
            let mut ready = watch.readable().await?;
            // What the events say is read from the file itself.
            let mut buffer = [MaybeUninit::uninit(); 512];
            while inotify::Reader::new(watch.get_ref(), &mut buffer).next().is_ok() {}
            ready.clear_ready();
        }
    }

    /// Freezes every process of the subtree, or lets them go on.
    pub async fn freeze(&self, still: bool) -> io::Result<()> {
        let (file, wanted) = if still { ("1", "frozen 1") } else { ("0", "frozen 0") };
        fs::write(self.path.join("cgroup.freeze"), file)?;
        let events = self.path.join("cgroup.events");
        let done = || Ok(fs::read_to_string(&events)?.lines().any(|line| line == wanted));
        let waited = until(FREEZE_LIMIT, done).await;
        if matches!(&waited, Err(error) if error.kind() == io::ErrorKind::TimedOut) {
            // Half frozen is neither.
            fs::write(self.path.join("cgroup.freeze"), "0")?;
        }
        waited
    }

    /// Writes the limits that `resources` names.
    pub fn limit(&self, resources: &LinuxResources) -> io::Result<()> {
        let manager = Manager::new(CGROUP_ROOT.into(), self.name()).map_err(io::Error::other)?;
        let wanted = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        manager.apply(&wanted).map_err(io::Error::other)
    }

    /// Waits until no process is left, after [`Cgroup::kill`].
    pub async fn emptied(&self) -> io::Result<()> {
        until(KILL_LIMIT, || Ok(self.processes()?.is_empty())).await
    }

    /// Removes the subtree, which is empty of processes.
    pub async fn remove(&self) -> io::Result<()> {
        // A process that has just died may hold its cgroup for a moment.
        let mut step = Duration::from_micros(500);
        loop {
            match remove(&self.path, DEPTH_LIMIT) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && step < KILL_LIMIT => {
                    tokio::time::sleep(step).await;
                    step *= 2;
                }
                result => return result,
            }
        }
    }
}

/// Looks, at first often and then less so, until something is done; `TimedOut` after `limit`.
async fn until(limit: Duration, done: impl Fn() -> io::Result<bool>) -> io::Result<()> {
    let (mut step, mut waited) = (Duration::from_micros(200), Duration::ZERO);
    while !done()? {
        if waited > limit {
            return Err(io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(step).await;
        waited += step;
        step = (step * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn collect(path: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        // A threaded cgroup lists its processes in its parent.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    pids.truncate(PROCESS_LIMIT);
    if depth == 0 {
        return Ok(());
    }
    for child in children(path).or_else(|e| if gone(&e) { Ok(Vec::new()) } else { Err(e) })? {
        collect(&child, depth - 1, pids)?;
    }
    Ok(())
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn remove(path: &Path, depth: usize) -> io::Result<()> {
    if depth > 0 {
        match children(path) {
            Ok(children) => children.iter().try_for_each(|child| remove(child, depth - 1))?,
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    gone_is_fine(fs::remove_dir(path))
}

/// How many kills `memory.events` counts.
fn kills(events: &str) -> u64 {
    counters(events).get("oom_kill").copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_events_are_read() {
        assert_eq!(kills("low 0\noom 1\noom_kill 2\noom_group_kill 0\n"), 2);
        assert_eq!(kills("low 0\noom 1\noom_kill 0\n"), 0);
        assert_eq!(kills(""), 0);
    }

    #[test]
    fn subtrees_are_listed_and_removed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("c");
        fs::create_dir_all(path.join("a/b")).expect("directories");
        fs::write(path.join("cgroup.procs"), "1\n22\n").expect("file");
        fs::write(path.join("a/cgroup.procs"), "").expect("file");
        fs::write(path.join("a/b/cgroup.procs"), "333\n").expect("file");
        let cgroup = Cgroup { path };
        assert_eq!(cgroup.processes().expect("listing"), [1, 22, 333]);
        assert_eq!(Cgroup::of("x").name(), Path::new("/husk/x"));
    }
}
