//! Clearing up after a sandbox whose shim is gone.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::{Record, RecordError, sandbox_folder};
use crate::resource::network::redirect;
use crate::resource::remove_cgroup;

/// How long killed processes are waited for, in milliseconds each.
const DEATH: u16 = 5000;

/// Why not everything could be cleared up.
#[derive(Debug, thiserror::Error)]
pub enum ClearError {
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The folder.
    #[error("cannot remove {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A sandbox's folder and its record as they were when they were looked at. The shim removes the record
/// when it begins to end, and may not come as far as to remove the rest.
#[derive(Debug)]
pub struct Leftovers {
    root: PathBuf,
    namespace: PathBuf,
    folder: PathBuf,
    record: Result<Option<Record>, RecordError>,
}

impl Leftovers {
    /// Looks at the sandbox `id` now.
    pub fn look(root: &Path, namespace: &str, id: &str) -> Self {
        let folder = sandbox_folder(root, namespace, id);
        let record = Record::read(&folder);
        Self { root: root.to_path_buf(), namespace: root.join(namespace), folder, record }
    }

    /// The socket of the sandbox's shim, as the record has it.
    pub fn socket(&self) -> Option<&Path> {
        self.record.as_ref().ok()?.as_ref()?.socket.as_deref()
    }

    /// Ends what is left of the sandbox's processes and removes its socket, its cgroups and its folder.
    /// Nothing to do is no error. Must be called outside the sandbox's mount namespace: there the folder
    /// holds nothing but empty mount points.
    pub fn clear(self) -> Result<(), ClearError> {
        let Self { root, namespace, folder, record } = self;
        if let Ok(Some(record)) = &record {
            clear_recorded(record);
        }
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ClearError::Folder { path: folder, source: error });
            }
            _ => {}
        }
        // Whoever clears up last removes them: not empty while there are other sandboxes.
        let _ = std::fs::remove_dir(namespace);
        let _ = std::fs::remove_dir(root);
        record?;
        Ok(())
    }
}

fn clear_recorded(record: &Record) {
    let processes: Vec<_> = record.processes.iter().filter_map(|one| one.open()).collect();
    for process in &processes {
        // ESRCH: it has ended meanwhile.
        let _ = process.signal(Signal::SIGKILL);
    }
    for process in &processes {
        let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut ended, PollTimeout::from(DEATH));
    }
    if let Some(socket) = &record.socket {
        let _ = std::fs::remove_file(socket);
    }
    record.cgroups.iter().for_each(|cgroup| remove_cgroup(cgroup));
    // Its taps went with the processes.
    record.network.iter().for_each(|network| redirect::clear(network));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ProcessRecord;

    #[test]
    fn processes_socket_and_folder_go() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("husk");
        let folder = sandbox_folder(&top, "ns", "x");
        std::fs::create_dir_all(folder.join("share/c/rootfs")).unwrap();
        let socket = root.path().join("socket");
        std::fs::write(&socket, "").unwrap();
        let cgroup = root.path().join("cgroup");
        std::fs::create_dir(&cgroup).unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let processes = vec![ProcessRecord::of(child.id()).unwrap()];
        let cgroups = vec![cgroup.clone()];
        // The namespace has gone before.
        let network = Some(root.path().join("netns"));
        Record { processes, socket: Some(socket.clone()), cgroups, network }
            .write(&folder)
            .unwrap();
        let leftovers = Leftovers::look(&top, "ns", "x");
        assert_eq!(leftovers.socket(), Some(socket.as_path()));
        // As a shim does that begins to end.
        Record::remove(&folder);
        leftovers.clear().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!socket.exists() && !top.exists() && !cgroup.exists());
        Leftovers::look(&top, "ns", "x").clear().unwrap();
    }
}
