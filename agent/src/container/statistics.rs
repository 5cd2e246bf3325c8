//! What a container uses, read from its cgroup.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

/// A limit that is not set.
const NO_LIMIT: u64 = u64::MAX;

/// The counters of one file, by name.
pub type Counters = HashMap<String, u64>;

/// A container's use of the guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// `cpu.stat`, microseconds and counts.
    pub cpu: Counters,
    /// `memory.stat`, bytes and counts.
    pub memory: Counters,
    /// `memory.events`.
    pub memory_events: Counters,
    /// Bytes in use, and at most.
    pub memory_current: u64,
    /// The limit on them.
    pub memory_max: u64,
    /// Bytes of swap in use.
    pub swap_current: u64,
    /// The limit on them.
    pub swap_max: u64,
    /// Processes and threads.
    pub pids_current: u64,
    /// The limit on them.
    pub pids_max: u64,
    /// `io.stat`, by the disk's numbers.
    pub disks: Vec<(u64, u64, Counters)>,
}

impl Statistics {
    /// Reads those of the cgroup at `path`. A controller that the guest lacks counts nothing.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = |name: &str| match fs::read_to_string(path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            other => other,
        };
        // The cgroup itself must be there.
        fs::metadata(path)?;
        Ok(Self {
            cpu: counters(&text("cpu.stat")?),
            memory: counters(&text("memory.stat")?),
            memory_events: counters(&text("memory.events")?),
            memory_current: number(&text("memory.current")?),
            memory_max: limit(&text("memory.max")?),
            swap_current: number(&text("memory.swap.current")?),
            swap_max: limit(&text("memory.swap.max")?),
            pids_current: number(&text("pids.current")?),
            pids_max: limit(&text("pids.max")?),
            disks: text("io.stat")?.lines().filter_map(disk).collect(),
        })
    }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or(NO_LIMIT)
}

/// Lines of a name and a number.
pub(super) fn counters(text: &str) -> Counters {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.map(|(name, value)| (name.to_owned(), number(value))).collect()
}

/// `254:0 rbytes=1 wbytes=2 …`
fn disk(line: &str) -> Option<(u64, u64, Counters)> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let pairs = words.filter_map(|word| word.split_once('='));
    let counters = pairs.map(|(name, value)| (name.to_owned(), number(value))).collect();
    Some((major.parse().ok()?, minor.parse().ok()?, counters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_cgroup_are_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("file");
        write("cpu.stat", "usage_usec 1500\nuser_usec 1000\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("pids.current", "3\n");
        write("pids.max", "100\n");
        write("io.stat", "254:16 rbytes=512 wbytes=0 rios=1\n8:0 \nnonsense\n");
        let read = Statistics::read(dir.path()).expect("statistics");
        assert_eq!(read.cpu["usage_usec"], 1500);
        assert_eq!((read.memory_current, read.memory_max), (4096, NO_LIMIT));
        assert_eq!((read.pids_current, read.pids_max), (3, 100));
        assert_eq!(read.disks[0].0, 254);
        assert_eq!(read.disks[0].2["rbytes"], 512);
        assert_eq!(read.disks[1], (8, 0, Counters::new()));
        assert_eq!(read.disks.len(), 2);
        assert!(Statistics::read(&dir.path().join("gone")).is_err());
    }
}
