//! Husk's processes on this host.

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The three processes of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The shim.
    Shim,
    /// The virtual machine.
    Machine,
    /// The file server.
    Files,
}

impl Role {
    /// Each of them.
    pub const ALL: [Self; 3] = [Self::Shim, Self::Machine, Self::Files];
}

/// Every process there is.
pub fn all() -> Result<Vec<u32>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).collect())
}

/// A process's command line.
pub fn words(pid: u32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// containerd's.
pub fn daemon() -> Option<u32> {
    all().ok()?.into_iter().find(|pid| words(*pid)[0] == "containerd")
}

fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    listed.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The process of a sandbox, if it is there yet.
pub fn find(role: Role, id: &str) -> Option<u32> {
    let is_shim = |pid: &u32| {
        let words = words(*pid);
        // Not the one that `start` or `delete` was called on.
        words[0].ends_with("containerd-shim-husk-v2")
            && words.windows(2).any(|pair| pair[0] == "-id" && pair[1] == id)
            && words.iter().any(|word| word == "-socket")
    };
    let shim = all().ok()?.into_iter().find(is_shim)?;
    let name = match role {
        Role::Shim => return Some(shim),
        Role::Machine => "machine",
        Role::Files => "files",
    };
    children(shim).into_iter().find(|pid| words(*pid).get(1).is_some_and(|word| word == name))
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

/// Bytes of memory that are a process's own, shared ones by their share; without a guest's memory,
/// which is anonymous mappings side by side that are `guest` bytes large together.
pub fn memory(pid: u32, guest: u64) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut own, mut run) = (0, Run::default());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        match first.strip_suffix(':') {
            Some("Size") => run.size += kibibytes(line)?,
            Some("Pss") => run.used += kibibytes(line)?,
            Some(_) => {}
            None => {
                let (start, end) = first.split_once('-').context("no range")?;
                let anonymous = words.next() == Some("rw-p") && words.nth(3).is_none();
                if !anonymous || start != run.end {
                    own += std::mem::take(&mut run).own(guest);
                }
                end.clone_into(&mut run.end);
            }
        }
    }
    Ok(own + run.own(guest))
}

/// Mappings side by side.
#[derive(Default)]
struct Run {
    end: String,
    size: u64,
    used: u64,
}

impl Run {
    fn own(self, guest: u64) -> u64 {
        if self.size >= guest { 0 } else { self.used }
    }
}

fn kibibytes(line: &str) -> Result<u64> {
    let number = line.split_whitespace().nth(1).context("no number")?;
    Ok(number.parse::<u64>()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_guests_size_is_not_counted() {
        let own = std::process::id();
        let before = memory(own, 64 << 20).expect("memory");
        let mut large = vec![0_u8; 100 << 20];
        large.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        let (without, with) = (memory(own, 64 << 20), memory(own, 1 << 40));
        let (without, with) = (without.expect("memory"), with.expect("memory"));
        assert!(without < before + (8 << 20), "{before} {without}");
        assert!(with > without + (99 << 20), "{without} {with}");
        assert!(large.contains(&1));
    }
}
