//! One container: its files, its init, and the processes added to it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_agent_protocols::agent::{CreateContainerRequest, ExecProcessRequest, ProcessEntry};
use oci_spec::runtime::{Hook, Spec};
use slog::{Logger, warn};

use super::changes;
use super::control::Going;
use super::exec::console_size;
use super::hooks::{self, HostHooks, State};
use super::lay_out::{LaidOut, lay_out, wire};
use super::out_of_memory::OutOfMemory;
use super::{
    Bounds, ContainerError, Exec, ExecRequest, Exit, HookError, MachineSize, Observer, Process,
    SizePlan, Status,
};
use crate::agent_client::{AgentClient, AgentError};
use crate::apart::{Aside, HostMounts, Purpose, alongside_within};
use crate::io::{Origin, StdioPaths, Streams};
use crate::lock::lock;
use crate::machine::Machine;
use crate::resource::{ContainerShare, MemoryVolume, ResourceError, RootfsMount, Share, Volumes};
use crate::spec::{GuestSpec, SpecError};

/// How often an exec'd process that was given up is looked for.
const FORGETTING: u32 = 10;

/// How long such a process may take to end, or to appear, between two looks.
const KILLED: Duration = Duration::from_secs(1);

/// Longer names would not fit into paths.
const LONGEST_NAME: usize = 128;

/// A container to be created.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Its name, unique in the sandbox.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its OCI spec.
    pub spec: Spec,
    /// The mounts of its root file system; none if `root.path` is one already.
    pub rootfs: Vec<RootfsMount>,
    /// Where the init's streams go.
    pub stdio: StdioPaths,
}

/// What every container of a sandbox needs to follow its processes.
#[derive(Clone)]
pub struct Follower {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The agent in it.
    pub agent: AgentClient,
    /// Who is told.
    pub observer: Arc<dyn Observer>,
    /// The log.
    pub log: Logger,
    pub(super) going: Going,
    pub(super) mounts: HostMounts,
    /// How large the machine is.
    pub size: Arc<MachineSize>,
    /// How long the guest may take for what it must not hold up.
    pub bounds: Bounds,
    /// containerd's namespace.
    namespace: String,
    pub(super) sandbox_id: String,
}

impl Follower {
    /// For the machine and the agent of the sandbox `id` in containerd's `namespace`, which are as `plan`
    /// says.
    pub fn new(
        (namespace, id): (&str, &str),
        machine: Arc<Machine>,
        agent: AgentClient,
        observer: Arc<dyn Observer>,
        mounts: HostMounts,
        plan: SizePlan,
        log: Logger,
    ) -> Self {
        let agent = agent.guarding(Arc::clone(&machine));
        let size = MachineSize::new(plan, Arc::clone(&machine), agent.clone(), log.clone());
        Self {
            agent,
            machine,
            size: Arc::new(size),
            observer,
            log,
            going: Going::default(),
            mounts,
            bounds: Bounds::default(),
            namespace: namespace.to_owned(),
            sandbox_id: id.to_owned(),
        }
    }

    /// Opens the streams of the process `id`, a container or one added to it.
    pub(crate) async fn open(
        &self,
        stdio: &StdioPaths,
        id: &str,
        bundle: &Path,
    ) -> Result<Streams, ContainerError> {
        let (namespace, mounts, log) = (self.namespace.as_str(), &self.mounts, &self.log);
        let origin = Origin { namespace, id, bundle, mounts, log };
        Ok(Streams::open(stdio, &self.machine, origin).await?)
    }

    /// An answer of the agent's, or why there is none.
    pub(crate) fn explained<T>(&self, answer: Result<T, AgentError>) -> Result<T, ContainerError> {
        answer.map_err(|error| self.explain(error.into()))
    }

    /// An agent that cannot be reached because its machine has ended is the machine's error.
    pub(crate) fn explain(&self, error: ContainerError) -> ContainerError {
        match (error, self.machine.ended()) {
            (
                ContainerError::Agent(_) | ContainerError::Streams(_) | ContainerError::Resize(_),
                Some(end),
            ) => ContainerError::MachineEnded(end.reason),
            (error, _) => error,
        }
    }
}

/// A process as the guest numbers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestProcess {
    /// Its id in the guest.
    pub pid: u32,
    /// Its name, if it is one that was added.
    pub exec_id: String,
}

/// A container.
pub struct Container {
    id: String,
    bundle: PathBuf,
    stdio: StdioPaths,
    pub(super) follower: Follower,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    pub(super) paused: AtomicBool,
    killer: Arc<OutOfMemory>,
    hooks: HostHooks,
    /// As hooks were told of it at first.
    state: State,
    /// Whether it has been deleted; held while it is.
    deleted: tokio::sync::Mutex<bool>,
    // Last: what the init's streams and files are on goes after them.
    share: Mutex<Option<Aside<ContainerShare>>>,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Container({})", self.id)
    }
}

impl Container {
    /// Lays out the files, opens the streams, and has the agent create the container.
    pub async fn create(
        request: CreateRequest,
        share: Arc<Share>,
        volumes: Arc<Volumes>,
        follower: Follower,
    ) -> Result<Self, ContainerError> {
        check_name(&request.id)?;
        let is_sandbox = request.id == follower.sandbox_id;
        let changes = Arc::clone(volumes.changes());
        // A source may lie on a file system that answers late, or never.
        let limit = follower.bounds.lay_out;
        let laid_out = alongside_within(Purpose::Open, limit, move || {
            lay_out(request, is_sandbox, &share, &volumes)
        });
        let LaidOut { request, guest, files, memory } =
            laid_out.await.map_err(ResourceError::Thread)??;
        let files = Aside::new(files);
        let state = State {
            oci_version: guest.spec.version().clone(),
            id: request.id.clone(),
            status: "creating",
            pid: follower.machine.pid(),
            bundle: request.bundle.clone(),
            annotations: guest.spec.annotations().clone().unwrap_or_default(),
        };
        let (init, killer) =
            match create_in_guest(&request, &guest, memory, &state, &follower).await {
                Ok(made) => made,
                Err(error) => {
                    // Unmounted before anybody hears of the failure, and removes what is below.
                    unmount(files, &request.id, &follower).await;
                    return Err(error);
                }
            };
        changes::tell(changes, &follower.agent);
        Ok(Self {
            id: request.id,
            bundle: request.bundle,
            stdio: request.stdio,
            follower,
            init,
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            killer,
            hooks: guest.hooks,
            state,
            deleted: tokio::sync::Mutex::new(false),
            share: Mutex::new(Some(files)),
        })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Where the init's streams go.
    pub fn stdio(&self) -> &StdioPaths {
        &self.stdio
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// The process of that name; empty for the init.
    pub(super) fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let exec = self.exec(exec_id)?;
        exec.process().ok_or(ContainerError::Status { action: "use", status: "not started" })
    }

    /// The added process of that name.
    pub fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, ContainerError> {
        let exec = lock(&self.execs).get(exec_id).cloned();
        exec.ok_or_else(|| ContainerError::NoProcess(exec_id.to_owned()))
    }

    /// Waits for the end of a process, also of one that is yet to be started.
    pub async fn wait(&self, exec_id: &str) -> Result<Exit, ContainerError> {
        if exec_id.is_empty() {
            return Ok(self.init.exited().await);
        }
        let exit = self.exec(exec_id)?.exited().await;
        exit.ok_or_else(|| ContainerError::NoProcess(exec_id.to_owned()))
    }

    /// Adds a process, to be started later.
    pub fn add_exec(&self, request: ExecRequest) -> Result<(), ContainerError> {
        check_name(&request.exec_id)?;
        self.demand(Status::Running, "exec in")?;
        let mut execs = lock(&self.execs);
        if execs.contains_key(&request.exec_id) {
            return Err(ContainerError::Exists(request.exec_id));
        }
        execs.insert(request.exec_id.clone(), Arc::new(Exec::new(request)));
        Ok(())
    }

    /// Starts an added process.
    pub async fn start_exec(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        let exec = self.exec(exec_id)?;
        self.demand(Status::Running, "exec in")?;
        let starting = exec.starting.lock().await;
        if let Some(process) = exec.process() {
            let status = process.status().name();
            return Err(ContainerError::Status { action: "start", status });
        }
        let streams = self.follower.open(&exec.request.stdio, exec_id, &self.bundle).await?;
        let mut call = ExecProcessRequest::new();
        call.container_id.clone_from(&self.id);
        exec_id.clone_into(&mut call.exec_id);
        call.process = serde_json::to_vec(&exec.request.spec).map_err(SpecError::Json)?;
        let mut ends = streams.for_agent();
        let size = exec.size();
        (ends.rows, ends.columns) = size;
        call.streams = Some(ends).into();
        let executed = self.follower.agent.exec_process(&call).await;
        if let Err(AgentError::Silent) = &executed {
            // Whatever becomes of it in the guest, nobody here knows it.
            tokio::spawn(forget_exec(self.follower.clone(), self.id.clone(), exec_id.to_owned()));
        }
        self.follower.explained(executed)?;
        let names = (self.id.as_str(), exec_id);
        let process = Process::follow(names, &self.follower, streams, &self.killer);
        process.started().await;
        exec.has_started(&process, size).await;
        drop(starting);
        Ok(process)
    }

    /// Forgets an added process that does not run; how it ended, if it ever ran.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<Option<Exit>, ContainerError> {
        let exec = self.exec(exec_id)?;
        let exit = match exec.process() {
            None => None,
            Some(process) => {
                let Some(exit) = process.exit() else {
                    let status = process.status().name();
                    return Err(ContainerError::Status { action: "delete", status });
                };
                process.close_streams().await;
                // It has exited: if the machine is gone too there is nothing left to forget.
                let _ = self.follower.agent.delete_process(&self.id, exec_id).await;
                Some(exit)
            }
        };
        lock(&self.execs).remove(exec_id);
        exec.deleted();
        Ok(exit)
    }

    /// Removes the container from the guest and the shared folder; how its init ended.
    pub async fn delete(&self) -> Result<Exit, ContainerError> {
        match self.status(&self.init) {
            Status::Created | Status::Stopped => {}
            status => {
                let status = status.name();
                return Err(ContainerError::Status { action: "delete", status });
            }
        }
        let mut deleted = self.deleted.lock().await;
        if *deleted {
            return Err(ContainerError::NoContainer(self.id.clone()));
        }
        self.delete_in_guest().await;
        let exit = self.init.exited_by_force().await;
        self.init.close_streams().await;
        let execs: Vec<_> = lock(&self.execs).drain().map(|(_, exec)| exec).collect();
        for exec in execs {
            if let Some(process) = exec.process() {
                process.close_streams().await;
            }
            exec.deleted();
        }
        let files = lock(&self.share).take();
        if let Some(files) = files {
            unmount(files, &self.id, &self.follower).await;
        }
        self.follower.going.lock().await.remove(&self.id);
        *deleted = true;
        drop(deleted);
        self.run_hooks(&self.hooks.stopped, "stopped").await;
        Ok(exit)
    }

    /// Has the guest remove what the container left in it. No guest keeps a container from being
    /// deleted: one that is silent loses its machine, and what one refuses to remove stays in it.
    async fn delete_in_guest(&self) {
        let Follower { agent, machine, bounds, log, .. } = &self.follower;
        if machine.ended().is_some() {
            return;
        }
        let deleted = tokio::time::timeout(bounds.delete, agent.delete_container(&self.id)).await;
        match deleted.unwrap_or(Err(AgentError::Silent)) {
            Ok(()) => {}
            Err(error @ AgentError::Refused { .. }) => {
                warn!(log, "the guest keeps remains of a container"; "container" => &self.id,
                    "error" => %error);
            }
            // With its machine the container is gone as well.
            Err(error) if machine.ended().is_none() => {
                machine.kill_all(&format!("a container was to be deleted, and {error}"));
                machine.end().await;
            }
            Err(_) => {}
        }
    }

    /// Runs the hooks that come after the start, to the first that fails.
    pub(super) async fn run_hooks_started(&self) -> Result<(), HookError> {
        let state = State { status: "running", ..self.state.clone() };
        hooks::run(&self.hooks.started, &state, &self.follower.mounts).await
    }

    /// Runs hooks whose failure changes nothing any more.
    async fn run_hooks(&self, hooks: &[Hook], status: &'static str) {
        let pid = if status == "stopped" { 0 } else { self.state.pid };
        let state = State { status, pid, ..self.state.clone() };
        hooks::run_all(hooks, &state, &self.follower.mounts, &self.follower.log).await;
    }

    /// Its processes by the guest's numbers.
    pub async fn processes(&self) -> Result<Vec<GuestProcess>, ContainerError> {
        let list = self.follower.agent.list_processes(&self.id).await;
        let list = self.follower.explained(list)?;
        let entry = |entry: ProcessEntry| GuestProcess { pid: entry.pid, exec_id: entry.exec_id };
        Ok(list.processes.into_iter().map(entry).collect())
    }
}

/// Runs the hooks before the creation, opens the streams, and has the agent create the container.
async fn create_in_guest(
    request: &CreateRequest,
    guest: &GuestSpec,
    memory: Vec<MemoryVolume>,
    state: &State,
    follower: &Follower,
) -> Result<(Arc<Process>, Arc<OutOfMemory>), ContainerError> {
    let streams = follower.open(&request.stdio, &request.id, &request.bundle).await?;
    let mut call = CreateContainerRequest::new();
    call.container_id.clone_from(&request.id);
    call.spec = serde_json::to_vec(&guest.spec).map_err(SpecError::Json)?;
    let mut ends = streams.for_agent();
    let process = guest.spec.process().as_ref();
    (ends.rows, ends.columns) = process.map(console_size).unwrap_or_default();
    call.streams = Some(ends).into();
    hooks::run(&guest.hooks.create, state, &follower.mounts).await?;
    for volume in memory {
        follower.explained(follower.agent.make_memory_volume(&wire(volume)).await)?;
    }
    follower.explained(follower.agent.create_container(&call).await)?;
    let killer = OutOfMemory::new(&request.id, state.pid, &follower.observer);
    killer.watch(follower.agent.clone());
    let init = Process::follow((&request.id, ""), follower, streams, &killer);
    Ok((init, killer))
}

/// Unmounts a container's files. They are detached in any case; file systems that do not let go in time are
/// left to a thread.
async fn unmount(files: Aside<ContainerShare>, id: &str, follower: &Follower) {
    if let Err(error) = files.end(follower.bounds.unmount).await {
        warn!(follower.log, "the files of a container are not unmounted yet"; "container" => id,
            "error" => %error);
    }
}

/// Ends and forgets an exec'd process that may have started too late to be told.
async fn forget_exec(follower: Follower, container: String, exec: String) {
    let agent = &follower.agent;
    let kill = libc::SIGKILL.unsigned_abs();
    for _ in 0..FORGETTING {
        match agent.signal_process(&container, &exec, kill, false).await {
            Ok(()) => {
                let ended = agent.wait_process(&container, &exec);
                if tokio::time::timeout(KILLED, ended).await.is_ok() {
                    break;
                }
            }
            // It has exited already, or the agent is still at work on it.
            Err(AgentError::Refused { .. }) => {
                if agent.delete_process(&container, &exec).await.is_ok() {
                    return;
                }
                tokio::time::sleep(KILLED).await;
            }
            Err(AgentError::Silent) => {}
            Err(AgentError::Lost(_)) => return,
        }
    }
    let _ = agent.delete_process(&container, &exec).await;
}

/// Names become folders on both sides.
fn check_name(name: &str) -> Result<(), ContainerError> {
    let fits = !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with('.');
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if fits && name.bytes().all(plain) {
        Ok(())
    } else {
        Err(ContainerError::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for good in ["a", "0f3c", "k8s_x-1.y"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "..", ".hidden", "a/b", "a b", "a\0b", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
