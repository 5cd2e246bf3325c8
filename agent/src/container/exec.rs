//! ExecProcess: a further process in a running container.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Uid;
use oci_spec::runtime::Process as SpecProcess;

use crate::container::error::{self, ContainerError, Tried};
use crate::container::execute::{Making, execute};
use crate::container::helper::{Console, ExecRequest};
use crate::container::lifecycle::Container;
use crate::container::limits;
use crate::container::spec::{self, SpecError};
use crate::host::Host;
use crate::init::reaper::Reaper;
use crate::process::{self, Links, Process, Stdio};

/// Makes and starts a process in `container`, as the OCI process in `json` says.
pub async fn exec(
    container: &Arc<Container>,
    exec: &str,
    json: &[u8],
    streams: process::Request,
    host: &Host,
    reaper: &Arc<Reaper>,
) -> Result<Arc<Process>, ContainerError> {
    let process = read(exec, json, streams.terminal)?;
    let place = container.reserve_exec(exec)?;
    let made = make(container, exec, process, place.init(), streams, host, reaper).await?;
    place.fill(made)
}

/// Reads the process to be called `exec`, and checks it.
pub fn read(exec: &str, json: &[u8], terminal: bool) -> Result<SpecProcess, ContainerError> {
    error::check_id(exec)?;
    let process: SpecProcess = serde_json::from_slice(json).map_err(SpecError::Json)?;
    spec::check_process(&process, terminal)?;
    Ok(process)
}

async fn make(
    container: &Arc<Container>,
    exec: &str,
    process: SpecProcess,
    init: u32,
    streams: process::Request,
    host: &Host,
    reaper: &Arc<Reaper>,
) -> Result<Arc<Process>, ContainerError> {
    limits::make_room(host, &process);
    let owner = Uid::from_raw(process.user().uid());
    let (stdio, links) = process::open(host, streams, owner).tried("open the streams")?;
    // Two helpers may be at work in one bundle, so each has a directory.
    let directory = container.bundle().path().join(format!("exec-{exec}"));
    std::fs::create_dir(&directory).tried("make the request")?;
    let directory = Directory(directory);
    make_in(&directory.0, container, process, init, (stdio, links), reaper).await
}

/// A directory that goes when this is dropped, as it is when a call is given up.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // A leftover goes with the bundle.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn make_in(
    directory: &Path,
    container: &Arc<Container>,
    process: SpecProcess,
    init: u32,
    (stdio, links): (Stdio, Links),
    reaper: &Arc<Reaper>,
) -> Result<Arc<Process>, ContainerError> {
    let (streams, owner) = (links.request(), Uid::from_raw(process.user().uid()));
    let console = Console::listen(directory, streams.terminal).tried("await the terminal")?;
    let request = ExecRequest {
        process,
        init,
        validity: container.validity().clone(),
        bundle: container.bundle().path().to_owned(),
        cgroup: container.cgroup().path().to_owned(),
        console: console.path(),
        rows: streams.rows,
        columns: streams.columns,
    };
    let cgroup = container.cgroup().clone();
    let making = Making { role: "exec", directory, request, console, owner, reaper };
    execute(making, (stdio, links), move || cgroup.out_of_memory()).await
}
