//! A container's directory in the agent's state: what the helper reads, and libcontainer's state.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::init::mounts::STATE;

/// The directory of one container.
#[derive(Debug, Clone)]
pub struct Bundle {
    id: String,
    path: PathBuf,
}

impl Bundle {
    /// Where the bundle of `id`, a checked id, is; [`Bundle::make`] makes it.
    pub fn of(id: &str) -> Self {
        Self { id: id.to_owned(), path: Path::new(STATE).join(id) }
    }

    /// Makes the directory.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir(&self.path)?;
        fs::create_dir(self.path.join("state"))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `value` as JSON to the file `name`.
    pub fn write(&self, name: &str, value: &impl Serialize) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        fs::write(&path, serde_json::to_vec(value)?)?;
        Ok(path)
    }

    /// Lets the created init go on: it waits at libcontainer's notify socket.
    pub fn notify(&self) -> io::Result<()> {
        // The path may be too long for a socket address, so it is shortened by a descriptor.
        let directory = fs::File::open(self.path.join("state").join(&self.id))?;
        let path = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
        UnixStream::connect(path)?.write_all(b"start container")
    }

    /// Removes the directory; nothing is mounted below it.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
