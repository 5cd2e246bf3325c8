//! The host's requests read and checked as they are when they are carried out, and nothing done: for
//! tests that make requests up.
//!
//! Each takes the message's bytes as ttrpc hands them over.

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;

use husk_agent_protocols::agent::{
    CreateContainerRequest, ExecProcessRequest, NetworkState, StartSandboxRequest,
    UpdateContainerRequest,
};
use oci_spec::runtime::Spec;
use protobuf::Message;

use crate::container::helper::lookup;
use crate::container::{Cgroup, check_id, devices, exec, spec};
use crate::network::change::{self, Kind};
use crate::rpc::service;
use crate::sandbox::start;

/// Why a request is refused.
pub type Refusal = Box<dyn Error + Send + Sync>;

/// What CreateContainer would hand to libcontainer, with `sandbox_pid` as the process whose PID
/// namespace containers share.
pub fn create_container(request: &[u8], sandbox_pid: Option<u32>) -> Result<Spec, Refusal> {
    let request = CreateContainerRequest::parse_from_bytes(request)?;
    let streams = service::streams(&request.streams);
    check_id(&request.container_id)?;
    let spec = spec::read(&request.spec)?;
    let sandbox_pid = sandbox_pid.filter(|_| spec::shares_pids(&spec));
    let cgroup = Cgroup::of(&request.container_id);
    let plan = spec::adapt(spec, &cgroup, streams.terminal, sandbox_pid)?;
    plan.spec.linux().as_ref().and_then(devices::program);
    lookup::complete(&plan.environment, plan.uid);
    Ok(plan.spec)
}

/// Whether ExecProcess would go on to look for its container.
pub fn exec_process(request: &[u8]) -> Result<(), Refusal> {
    let request = ExecProcessRequest::parse_from_bytes(request)?;
    let streams = service::streams(&request.streams);
    exec::read(&request.exec_id, &request.process, streams.terminal)?;
    Ok(())
}

/// Whether UpdateContainer would go on to look for its container.
pub fn update_container(request: &[u8]) -> Result<(), Refusal> {
    let request = UpdateContainerRequest::parse_from_bytes(request)?;
    spec::read_limits(&request.resources)?;
    Ok(())
}

/// The files that StartSandbox would write kernel parameters to.
pub fn start_sandbox(request: &[u8]) -> Result<Vec<PathBuf>, Refusal> {
    let request = StartSandboxRequest::parse_from_bytes(request)?;
    let setup = service::setup(request);
    Ok(setup.parameters.keys().filter_map(|name| start::parameter_path(name)).collect())
}

/// How many of the messages in UpdateNetwork's state the kernel would be asked to carry out, were
/// there two interfaces; with the packet filter's tables.
pub fn update_network(request: &[u8]) -> Result<usize, Refusal> {
    let state = service::state(NetworkState::parse_from_bytes(request)?);
    let numbers = HashMap::from([(1, 1), (2, 7), (3, 8)]);
    let good = |kind: &Kind| {
        let messages = state.of(*kind).iter();
        messages.filter(|message| change::check(*kind, message, &numbers).is_ok()).count()
    };
    let tables = state.filter.nftables.iter().filter(|table| !table.making(true).is_empty());
    Ok(Kind::ALL.iter().map(good).sum::<usize>() + tables.count())
}
