//! Listings of what a machine holds: processes, mounts, sockets, folders, cgroups, links.
//!
//! Taken before and after, they show by their difference what was left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::processes;
use crate::wait::until_true;

/// Folders in which runtimes keep their state.
const STATE: [&str; 8] = [
    "/run/husk",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/netns",
    "/tmp",
    "/dev/shm",
];

/// Everything there is at one moment, one line each.
#[derive(Debug, Clone)]
pub struct Listing(BTreeSet<String>);

impl Listing {
    /// Lists the machine as it is now.
    pub fn now() -> Result<Self> {
        let mut lines = BTreeSet::new();
        processes(&mut lines)?;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Mount ids differ from mount to mount; the place and the kind do not.
            let fields: Vec<&str> = line.split(' ').collect();
            lines.insert(format!("mount {} {}", fields[4], fields[3]));
        }
        for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
            if let Some(path) = line.split_whitespace().nth(7) {
                lines.insert(format!("socket {path}"));
            }
        }
        for folder in STATE {
            walk(Path::new(folder), "file", false, &mut lines);
        }
        walk(Path::new("/sys/fs/cgroup"), "cgroup", true, &mut lines);
        walk(Path::new("/sys/class/net"), "link", false, &mut lines);
        Ok(Self(lines))
    }

    /// What is there and was not there before.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Fails unless the machine is again as it was within `patience`.
pub fn nothing_left(before: &Listing, patience: Duration) -> Result<()> {
    let mut added = Vec::new();
    let gone = until_true("it is all gone", patience, || {
        added = Listing::now()?.added_since(before);
        Ok(added.is_empty())
    });
    gone.with_context(|| format!("left behind:\n  {}", added.join("\n  ")))
}

/// How much memory is used for what, in KiB, by the names of /proc/meminfo; and containerd's heap, and free
/// pages that processors keep for themselves, which `MemFree` leaves out: some 50 MiB after a guest's end.
#[derive(Debug, Clone)]
pub struct Memory(BTreeMap<String, u64>);

impl Memory {
    /// As it is now.
    pub fn now() -> Result<Self> {
        // Also what is kept of cgroups that are gone.
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let read = |file: &str| -> Result<BTreeMap<String, u64>> {
            let text = fs::read_to_string(file)?;
            let fields = text.lines().filter_map(|line| line.split_once(':'));
            let number = |text: &str| text.split_whitespace().next()?.parse().ok();
            Ok(fields.filter_map(|(name, value)| Some((name.to_owned(), number(value)?))).collect())
        };
        let daemon = processes::daemon().context("no containerd")?;
        let mut fields = read("/proc/meminfo")?;
        let heap = read(&format!("/proc/{daemon}/status"))?["RssAnon"];
        fields.insert("containerd".to_owned(), heap);
        let zones = fs::read_to_string("/proc/zoneinfo")?;
        let pages = zones.lines().filter_map(|line| line.trim().strip_prefix("count:"));
        let kept: u64 = pages.filter_map(|pages| pages.trim().parse::<u64>().ok()).sum();
        fields.insert("processors".to_owned(), kept * 4);
        Ok(Self(fields))
    }

    /// What nothing holds, but for the kernel's caches, files in memory, and containerd's heap, which comes
    /// and goes by tens of MiB whatever ran. (`MemAvailable` counts caches in part only, so it changes with
    /// what is in them.)
    fn free(&self) -> u64 {
        let free = ["MemFree", "processors", "Buffers", "Cached", "SReclaimable", "containerd"];
        free.iter().map(|name| self.0[*name]).sum()
    }

    /// KiB that were free `before` and are not now.
    pub fn lost_since(&self, before: &Self) -> u64 {
        before.free().saturating_sub(self.free())
    }

    /// What has changed by more than a MiB, for a message.
    pub fn changes_since(&self, before: &Self) -> String {
        let changes = self.0.iter().filter_map(|(name, now)| {
            let (now, before) =
                (i64::try_from(*now).ok()?, i64::try_from(*before.0.get(name)?).ok()?);
            let change = (now - before) >> 10;
            (change.abs() > 1).then(|| format!("{name} {change:+} MiB"))
        });
        changes.collect::<Vec<_>>().join(", ")
    }
}

fn processes(lines: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(pid) = path.file_name().unwrap_or_default().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // A process may end between listing and looking.
        let Ok(command) = fs::read(path.join("cmdline")) else { continue };
        let zombie = fs::read_to_string(path.join("stat")).is_ok_and(|stat| stat.contains(") Z "));
        // Kernel threads have no command line and come and go by themselves.
        if command.is_empty() && !zombie {
            continue;
        }
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        lines.insert(format!("process {pid} {}{command}", if zombie { "zombie " } else { "" }));
    }
    Ok(())
}

fn walk(folder: &Path, kind: &str, folders_only: bool, lines: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
        if is_folder || !folders_only {
            lines.insert(format!("{kind} {}", entry.path().display()));
        }
        if is_folder {
            walk(&entry.path(), kind, folders_only, lines);
        }
    }
}
