//! The record of a sandbox's processes.

use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::machine::PidFd;

const NAME: &str = "record.json";

/// Why a record cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file.
    #[error("the sandbox's record {path}")]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its text.
    #[error("the sandbox's record {path} is not understood")]
    Json {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A process, told apart from a later one of the same number by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: i32,
    /// Clock ticks from boot to its start (field 22 of `/proc/<pid>/stat`).
    pub started: u64,
}

/// What has to be known to clear up after a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The shim, the machine, the file server: whatever there is already.
    pub processes: Vec<ProcessRecord>,
    /// The shim's socket.
    pub socket: Option<PathBuf>,
    /// The cgroups that they are in, to be removed.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// The network namespace that outlives them.
    #[serde(default)]
    pub network: Option<PathBuf>,
}

impl ProcessRecord {
    /// Of a process that is there now.
    pub fn of(pid: u32) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        Some(Self { pid, started: started(pid)? })
    }

    /// Opens the process if it is still the same.
    pub fn open(&self) -> Option<PidFd> {
        // Opened first: if it is the right one afterwards, the descriptor is of the right one.
        let process = PidFd::open(Pid::from_raw(self.pid)).ok()?;
        (started(self.pid) == Some(self.started)).then_some(process)
    }
}

impl Record {
    /// Writes it into the sandbox's folder, whole or not at all.
    pub fn write(&self, folder: &Path) -> Result<(), RecordError> {
        let path = folder.join(NAME);
        let text = serde_json::to_vec(self)
            .map_err(|source| RecordError::Json { path: path.clone(), source })?;
        let new = folder.join(".record.json");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|source| RecordError::File { path, source })
    }

    /// Reads it from the sandbox's folder; none if there is none.
    pub fn read(folder: &Path) -> Result<Option<Self>, RecordError> {
        let path = folder.join(NAME);
        match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RecordError::File { path, source }),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|source| RecordError::Json { path, source }),
        }
    }

    /// Removes it from the sandbox's folder.
    pub fn remove(folder: &Path) {
        let _ = std::fs::remove_file(folder.join(NAME));
    }
}

/// When a process started; none if it is not there.
fn started(pid: i32) -> Option<u64> {
    let [started] = stat(pid, [22])?;
    Some(started)
}

/// Fields of `/proc/<pid>/stat` by their numbers in proc(5), from 3 on; none if it is not there.
pub(crate) fn stat<const N: usize>(pid: i32, numbers: [usize; N]) -> Option<[u64; N]> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, parentheses too.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = [0; N];
    for (field, number) in fields.iter_mut().zip(numbers) {
        *field = rest.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()?;
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_written() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), None);
        let processes = vec![ProcessRecord::of(std::process::id()).unwrap()];
        let socket = Some("/run/s".into());
        let network = Some("/run/netns/n".into());
        let record = Record { processes, socket, cgroups: Vec::new(), network };
        record.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap(), Some(record));
        Record::remove(folder.path());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_number_used_again_is_another_process() {
        let mut process = ProcessRecord::of(std::process::id()).unwrap();
        assert!(process.open().is_some());
        process.started += 1;
        assert!(process.open().is_none());
        assert_eq!(ProcessRecord::of(u32::MAX), None);
    }
}
