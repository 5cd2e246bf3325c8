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

/// Ends what is left of a sandbox's processes and removes its socket and its folder. Nothing to do
/// is no error. Must be called outside the sandbox's mount namespace: there the folder holds
/// nothing but empty mount points.
pub fn clear(root: &Path, namespace: &str, id: &str) -> Result<(), ClearError> {
    let folder = sandbox_folder(root, namespace, id);
    let record = Record::read(&folder);
    if let Ok(Some(record)) = &record {
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
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(ClearError::Folder { path: folder, source: error });
        }
        _ => {}
    }
    // The last one closes the door: not empty while there are other sandboxes.
    let _ = std::fs::remove_dir(root.join(namespace));
    let _ = std::fs::remove_dir(root);
    record?;
    Ok(())
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
        clear(&top, "ns", "x").unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!socket.exists() && !top.exists() && !cgroup.exists());
        clear(&top, "ns", "x").unwrap();
    }
}
