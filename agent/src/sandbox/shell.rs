//! Programs of the host's in the guest itself, for whoever looks after the machine.
//!
//! The guest has no programs beside the agent, so each shell brings its own. It is a file only until
//! it has been executed, and everything that it has started ends with it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::Uid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::container::helper::{Console, ShellRequest};
use crate::container::{Cgroup, ContainerError, Making, Tried, check_id, execute};
use crate::host::{Address, Host, connected};
use crate::init::calls;
use crate::init::mounts::STATE;
use crate::init::reaper::Reaper;
use crate::process::{self, Process};

/// A larger program is refused: it takes up the guest's memory.
const PROGRAM_LIMIT: usize = 64 << 20;
/// How long it may take to come.
const PROGRAM_PATIENCE: Duration = Duration::from_secs(30);

/// A shell to be started.
#[derive(Debug)]
pub struct ShellStart {
    /// Where the program comes from.
    pub program: Address,
    /// Its arguments, its name the first.
    pub arguments: Vec<String>,
    /// Its environment.
    pub environment: Vec<String>,
    /// Its streams.
    pub streams: process::Request,
}

/// The shells there are.
#[derive(Debug, Default)]
pub struct Shells {
    /// None while the helper is at work on one.
    known: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

impl Shells {
    fn known(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one under a new id.
    pub async fn start(
        &self,
        id: &str,
        start: ShellStart,
        host: &Host,
        reaper: &Arc<Reaper>,
    ) -> Result<Arc<Process>, ContainerError> {
        check_id(id)?;
        {
            let mut known = self.known();
            if known.contains_key(id) {
                return Err(ContainerError::Exists(format!("shell {id}")));
            }
            known.insert(id.to_owned(), None);
        }
        let directory = Path::new(STATE).join(format!("shell-{id}"));
        let cgroup = Cgroup::of_shell(id);
        let made = make(start, &directory, &cgroup, host, reaper).await;
        let _ = fs::remove_dir_all(&directory);
        match &made {
            Ok(process) => {
                self.known().insert(id.to_owned(), Some(Arc::clone(process)));
            }
            Err(_) => {
                let _ = cgroup.kill();
                let _ = cgroup.remove().await;
                self.known().remove(id);
            }
        }
        made
    }

    /// The shell of an id.
    pub fn process(&self, id: &str) -> Result<Arc<Process>, ContainerError> {
        let found = self.known().get(id).cloned().flatten();
        let short = || id.chars().take(128).collect::<String>();
        found.ok_or_else(|| ContainerError::NotFound(format!("shell {}", short())))
    }

    /// Ends one, with all that it has started, and forgets it.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let process = self.process(id)?;
        let cgroup = Cgroup::of_shell(id);
        cgroup.kill().tried("end the shell")?;
        process.wait().await;
        process.hang_up();
        cgroup.remove().await.tried("remove the shell")?;
        self.known().remove(id);
        Ok(())
    }
}

async fn make(
    start: ShellStart,
    directory: &Path,
    cgroup: &Cgroup,
    host: &Host,
    reaper: &Arc<Reaper>,
) -> Result<Arc<Process>, ContainerError> {
    fs::create_dir(directory).tried("make the request")?;
    let program = directory.join("program");
    let received = receive(host, start.program, &program);
    match tokio::time::timeout(PROGRAM_PATIENCE, received).await {
        Ok(received) => received.tried("receive the program")?,
        Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)).tried("receive the program")?,
    }
    let (root, streams) = (Uid::from_raw(0), start.streams);
    let (stdio, links) = process::open(host, streams, root).tried("open the streams")?;
    let console = Console::listen(directory, streams.terminal).tried("await the terminal")?;
    cgroup.make(None).tried("make the cgroup")?;
    let request = ShellRequest {
        program,
        arguments: start.arguments,
        environment: start.environment,
        cgroup: cgroup.path().to_owned(),
        console: console.path(),
        rows: streams.rows,
        columns: streams.columns,
    };
    let making = Making { role: "shell", directory, request, console, owner: root, reaper };
    let cgroup = cgroup.clone();
    let at_exit = move || {
        // What it has left running holds its streams.
        let _ = cgroup.kill();
        0
    };
    execute(making, (stdio, links), at_exit).await
}

/// Writes what comes from `address` into an executable file.
async fn receive(host: &Host, address: Address, path: &Path) -> io::Result<()> {
    let socket = calls::watch(host.dial(address)?, Interest::READABLE | Interest::WRITABLE)?;
    connected(&socket).await?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(path)?;
    let mut left = PROGRAM_LIMIT;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match piece(&socket, &mut buffer).await? {
            0 => return whole(&file),
            count if count <= left => {
                left -= count;
                file.write_all(&buffer[..count])?;
            }
            _ => return Err(io::ErrorKind::FileTooLarge.into()),
        }
    }
}

/// Something must have come.
fn whole(file: &File) -> io::Result<()> {
    match file.metadata()?.len() {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

async fn piece(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(socket.get_ref().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => socket.readable().await?.clear_ready(),
            result => return Ok(result?),
        }
    }
}
