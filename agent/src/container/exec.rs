//! ExecProcess: a further process in a running container.

use std::sync::Arc;

use nix::unistd::Uid;
use oci_spec::runtime::Process as SpecProcess;

use crate::container::error::{self, ContainerError, Tried};
use crate::container::helper::{Console, ExecRequest, Helper};
use crate::container::lifecycle::Container;
use crate::container::spec::{self, SpecError};
use crate::host::Host;
use crate::init::reaper::Reaper;
use crate::process::{self, Process};

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
    let init = container.reserve_exec(exec)?;
    let made = make(container, exec, process, init.pid(), streams, host, reaper).await;
    container.fill_exec(exec, made.as_ref().ok().cloned());
    made
}

/// Reads the process to be called `exec`, and checks it.
pub fn read(exec: &str, json: &[u8], terminal: bool) -> Result<SpecProcess, ContainerError> {
    error::check_id(exec)?;
    let process: SpecProcess = serde_json::from_slice(json).map_err(SpecError::Json)?;
    spec::check_process(&process, terminal)?;
    if process.scheduler().is_some() || process.io_priority().is_some() {
        return Err(SpecError::Invalid(
            "process.scheduler and process.ioPriority can be set for a container's init only",
        )
        .into());
    }
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
    let owner = Uid::from_raw(process.user().uid());
    let (stdio, links) = process::open(host, streams, owner).tried("open the streams")?;
    // Two helpers may be at work in one bundle, so each has a directory.
    let directory = container.bundle().path().join(format!("exec-{exec}"));
    std::fs::create_dir(&directory).tried("make the request")?;
    let made = async {
        let console = Console::listen(&directory, streams.terminal).tried("await the terminal")?;
        let request = ExecRequest {
            process,
            init,
            bundle: container.bundle().path().to_owned(),
            cgroup: container.cgroup().path().to_owned(),
            console: console.path(),
            rows: streams.rows,
            columns: streams.columns,
        };
        let request = serde_json::to_vec(&request).map_err(SpecError::Json)?;
        std::fs::write(directory.join("exec.json"), request).tried("write the request")?;
        let hold = reaper.hold();
        let helper = Helper::spawn("exec", &directory, stdio).tried("execute the helper")?;
        let pid = helper.pid().await?;
        let exit = reaper.watch(pid);
        drop(hold);
        helper.executed().await?;
        let master = console.master(owner).tried("receive the terminal")?;
        links.connected().await.tried("connect the streams")?;
        let relays = links.relay(master).tried("relay the streams")?;
        let cgroup = container.cgroup().clone();
        Ok(Process::follow(pid, relays, exit, move || cgroup.out_of_memory()))
    }
    .await;
    // A leftover goes with the bundle.
    let _ = std::fs::remove_dir_all(&directory);
    made
}
