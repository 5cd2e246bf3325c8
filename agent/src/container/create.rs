//! CreateContainer: bundle, streams, helper, relays; undone in reverse if one of them fails.

use std::sync::Arc;

use nix::unistd::Uid;

use crate::container::error::{ContainerError, Tried};
use crate::container::helper::{Console, CreateRequest, Helper};
use crate::container::lifecycle::Container;
use crate::container::pids::SharedPids;
use crate::container::spec;
use crate::container::volumes::Volumes;
use crate::container::{delete, devices, error, limits};
use crate::host::Host;
use crate::init::reaper::Reaper;
use crate::process::{self, Process};

/// What a container is made of.
pub struct Parts<'a> {
    /// The OCI spec as JSON.
    pub spec: &'a [u8],
    /// The init's streams.
    pub streams: process::Request,
    /// Who is at their other ends.
    pub host: &'a Host,
    /// Who waits for the init.
    pub reaper: &'a Arc<Reaper>,
    /// Those of all containers.
    pub volumes: &'a Arc<Volumes>,
    /// The PID namespace that containers may share.
    pub shared_pids: SharedPids<'a>,
}

/// Makes the init process of `container`, a new one.
pub async fn create(
    container: &Arc<Container>,
    parts: Parts<'_>,
) -> Result<Arc<Process>, ContainerError> {
    error::check_id(container.id())?;
    let result = make(container, parts).await;
    if result.is_err() {
        // What was not made yet is not there to remove; the first error is the one to tell.
        let _ = delete::clean(container).await;
    }
    result
}

async fn make(
    container: &Arc<Container>,
    parts: Parts<'_>,
) -> Result<Arc<Process>, ContainerError> {
    let Parts { spec, streams, host, reaper, volumes, shared_pids } = parts;
    let spec = spec::read(spec)?;
    let sandbox_pid = match shared_pids {
        SharedPids::Own(pid) => pid,
        SharedPids::Holder(holder) if spec::shares_pids(&spec) => Some(holder.pid(reaper).await?),
        SharedPids::Holder(_) => None,
    };
    let plan = spec::adapt(spec, container.cgroup(), streams.terminal, sandbox_pid)?;
    if let Some(process) = plan.spec.process() {
        limits::make_room(host, process);
    }
    container.holds(volumes.hold(&plan.spec).await.tried("mount the volumes")?);
    let bundle = container.bundle();
    bundle.make().tried("make the bundle")?;
    let devices = plan.spec.linux().as_ref().and_then(devices::program);
    container.cgroup().make(devices.as_deref()).tried("make the cgroup")?;
    bundle.write("config.json", &plan.spec).tried("write the spec")?;

    let owner = Uid::from_raw(plan.uid);
    let (stdio, links) = process::open(host, streams, owner).tried("open the streams")?;
    let console = Console::listen(bundle.path(), streams.terminal).tried("await the terminal")?;
    let request = CreateRequest {
        id: container.id().to_owned(),
        environment: plan.environment,
        directory: plan.late_directory,
        early_directory: plan.early_directory,
        console: console.path(),
        loopback: plan.new_network,
    };
    bundle.write("create.json", &request).tried("write the request")?;

    let hold = reaper.hold();
    let mut helper = Helper::spawn("create", bundle.path(), stdio).tried("execute the helper")?;
    let pid = helper.pid().await?;
    let master = console.master(owner).tried("receive the terminal")?;
    links.connected().await.tried("connect the streams")?;
    let relays = links.relay(master).tried("relay the streams")?;

    let exit = reaper.watch(pid);
    drop(hold);
    let (cgroup, shared_pids) = (container.cgroup().clone(), plan.shared_pids);
    let process = Process::follow(pid, relays, exit, move || {
        let out_of_memory = cgroup.out_of_memory();
        if shared_pids {
            // Without a PID namespace nothing else ends the others; they cannot refuse.
            let _ = cgroup.kill();
        }
        out_of_memory
    });
    container.created(Arc::clone(&process), helper);
    Ok(process)
}
