//! One method per call of the contract, with its deadline.

use std::sync::Arc;
use std::time::Duration;

use husk_agent_protocols::agent::{
    AdjustClockRequest, ContainerRequest, CreateContainerRequest, Empty, ExecProcessRequest,
    FilterRefusal, ForwardPortRequest, HostPort, ListProcessesResponse, MemoryVolume, NetworkState,
    ProcessRequest, RepeatChangesRequest, ResizeTerminalRequest, ServeResolverRequest,
    SetProcessorsRequest, SignalProcessRequest, StartSandboxRequest, StartSandboxResponse,
    StartShellRequest, StatContainerResponse, UpdateContainerRequest, WaitOutOfMemoryRequest,
    WaitProcessResponse,
};
use husk_agent_protocols::agent_ttrpc;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};
pub use ttrpc::proto::Code;

use super::gate::{After, Gate, Inside};
use crate::machine::{Machine, StreamAddress};
use crate::printable;

/// For calls that only look something up or pass a signal on.
const SHORT: Duration = Duration::from_secs(10);

/// For calls that start or end processes.
const LONG: Duration = Duration::from_secs(60);

/// Longer texts of the guest's are cut.
const LONGEST_TEXT: usize = 4096;

/// More texts of the guest's at once are left out.
const MOST_TEXTS: usize = 32;

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error.
    #[error("{message}")]
    Refused {
        /// Its gRPC code.
        code: Code,
        /// Its text.
        message: String,
    },
    /// No answer in time.
    #[error("the agent did not answer in time")]
    Silent,
    /// The connection is gone, or what came over it was no answer.
    #[error("the connection to the agent broke: {0}")]
    Lost(String),
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = status.code.enum_value().unwrap_or(Code::UNKNOWN);
                if code == Code::DEADLINE_EXCEEDED {
                    return Self::Silent;
                }
                Self::Refused { code, message: cut(&status.message) }
            }
            other => Self::Lost(cut(&other.to_string())),
        }
    }
}

type Result<T> = std::result::Result<T, AgentError>;

/// A connection to an agent; clones share it.
#[derive(Clone)]
pub struct AgentClient {
    wire: agent_ttrpc::AgentClient,
    gate: Option<Arc<Gate>>,
}

impl std::fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AgentClient")
    }
}

/// Returns at most [`MOST_TEXTS`] of the guest's texts, each cut and safe to show.
pub(crate) fn sanitize(texts: &[String]) -> Vec<String> {
    texts.iter().take(MOST_TEXTS).map(|text| cut(text)).collect()
}

/// Returns a text of the guest's as one line of at most [`LONGEST_TEXT`] characters, which those that are
/// escaped take more of.
fn cut(text: &str) -> String {
    let end = text.char_indices().nth(LONGEST_TEXT).map_or(text.len(), |(end, _)| end);
    printable::line(&text[..end]).chars().take(LONGEST_TEXT).collect()
}

fn short() -> Context {
    with_duration(SHORT)
}

fn long() -> Context {
    with_duration(LONG)
}

impl AgentClient {
    /// Over the stream the agent opened.
    pub fn new(stream: tokio::net::UnixStream) -> Self {
        let wire = agent_ttrpc::AgentClient::new(Client::new(Socket::from(stream)));
        Self { wire, gate: None }
    }

    /// From now on calls see to it that the machine's processors run.
    pub fn guarding(self, machine: Arc<Machine>) -> Self {
        Self { gate: Some(Arc::new(Gate::new(machine))), ..self }
    }

    /// Makes a call while the processors run.
    async fn awake<T>(
        &self,
        after: After,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T> {
        let Some(gate) = &self.gate else { return Ok(call.await?) };
        let inside = gate.enter().await;
        let result = tokio::select! {
            biased;
            result = call => result,
            end = gate.machine().end() => return Err(AgentError::Lost(end.reason)),
        };
        // A refused pause has paused nothing.
        let after = if result.is_err() && after == After::Still { After::Unchanged } else { after };
        inside.leave(after).await;
        Ok(result?)
    }

    /// Does `work` while the processors run.
    pub async fn while_awake<T>(&self, work: impl Future<Output = T>) -> T {
        let Some(gate) = &self.gate else { return work.await };
        let inside = gate.enter().await;
        let done = work.await;
        inside.leave(After::Unchanged).await;
        done
    }

    /// Brings processors on line or takes them off line, until `count` are.
    pub async fn set_processors(&self, count: u8) -> Result<()> {
        let request = SetProcessorsRequest { count: count.into(), ..Default::default() };
        self.awake(After::Unchanged, self.wire.set_processors(long(), &request)).await?;
        Ok(())
    }

    /// Has the guest look for devices that have come since it started.
    pub async fn look_for_devices(&self) -> Result<()> {
        self.awake(After::Unchanged, self.wire.look_for_devices(long(), &Empty::new())).await?;
        Ok(())
    }

    /// Reads the guest's clock: nanoseconds since the epoch.
    pub async fn read_clock(&self) -> Result<i64> {
        let nothing = Empty::new();
        let answer = self.awake(After::Unchanged, self.wire.read_clock(short(), &nothing)).await?;
        Ok(answer.nanoseconds)
    }

    /// Moves the guest's clock and sets its rate.
    pub async fn adjust_clock(&self, request: &AdjustClockRequest) -> Result<()> {
        self.awake(After::Unchanged, self.wire.adjust_clock(short(), request)).await?;
        Ok(())
    }

    /// Sets up what all containers share; first of all calls.
    pub async fn start_sandbox(
        &self,
        request: &StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        self.awake(After::Going, self.wire.start_sandbox(long(), request)).await
    }

    /// Makes the guest's network what `state` says; what its kernel refused of it, in words, and of the packet
    /// filter.
    pub async fn update_network(
        &self,
        state: &NetworkState,
    ) -> Result<(Vec<String>, Vec<FilterRefusal>)> {
        let answer = self.awake(After::Unchanged, self.wire.update_network(long(), state)).await?;
        Ok((sanitize(&answer.refused), answer.filter_refused))
    }

    /// Asks for the orderly end; at most `limit` for the answer.
    pub async fn shutdown(&self, limit: Duration) -> Result<()> {
        self.awake(After::Going, self.wire.shutdown(with_duration(limit), &Empty::new())).await?;
        Ok(())
    }

    /// Has the guest's kernel raise the events of changes on volumes.
    pub async fn repeat_changes(&self, request: &RepeatChangesRequest) -> Result<()> {
        self.awake(After::Unchanged, self.wire.repeat_changes(short(), request)).await?;
        Ok(())
    }

    /// Makes memory of the guest's for a volume, unless it is there.
    pub async fn make_memory_volume(&self, volume: &MemoryVolume) -> Result<()> {
        self.awake(After::Going, self.wire.make_memory_volume(long(), volume)).await?;
        Ok(())
    }

    /// Creates a container; returns the init's process id in the guest.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32> {
        Ok(self.awake(After::Going, self.wire.create_container(long(), request)).await?.pid)
    }

    /// Lets a created init go.
    pub async fn start_container(&self, container_id: &str) -> Result<()> {
        self.awake(After::Going, self.wire.start_container(long(), &container(container_id)))
            .await?;
        Ok(())
    }

    /// Removes a container, whatever is left of it.
    pub async fn delete_container(&self, container_id: &str) -> Result<()> {
        self.awake(After::Going, self.wire.delete_container(long(), &container(container_id)))
            .await?;
        Ok(())
    }

    /// Adds and starts a process; returns its id in the guest.
    pub async fn exec_process(&self, request: &ExecProcessRequest) -> Result<u32> {
        Ok(self.awake(After::Going, self.wire.exec_process(long(), request)).await?.pid)
    }

    /// Keeps the machine's processors running, whatever is paused, until the answer is dropped.
    pub(crate) async fn stay_awake(&self) -> Option<Inside> {
        match &self.gate {
            Some(gate) => Some(gate.enter().await),
            None => None,
        }
    }

    /// Starts a program of the host's in no container; returns its id in the guest.
    pub async fn start_shell(&self, request: &StartShellRequest) -> Result<u32> {
        Ok(self.awake(After::Unchanged, self.wire.start_shell(long(), request)).await?.pid)
    }

    /// Has the guest connect its loopback device's `port` with `host`.
    pub async fn forward_port(&self, port: u16, ipv6: bool, host: StreamAddress) -> Result<()> {
        let host = Some(HostPort::from(host)).into();
        let request = ForwardPortRequest { port: port.into(), ipv6, host, ..Default::default() };
        self.awake(After::Unchanged, self.wire.forward_port(short(), &request)).await?;
        Ok(())
    }

    /// Has the guest ask names of `host`.
    pub async fn serve_resolver(&self, host: StreamAddress) -> Result<()> {
        let host = Some(HostPort::from(host)).into();
        let request = ServeResolverRequest { host, ..Default::default() };
        self.awake(After::Unchanged, self.wire.serve_resolver(short(), &request)).await?;
        Ok(())
    }

    /// Ends such a program and forgets it.
    pub async fn delete_shell(&self, shell_id: &str) -> Result<()> {
        let request = process("", shell_id);
        self.awake(After::Unchanged, self.wire.delete_process(long(), &request)).await?;
        Ok(())
    }

    /// Waits, however long it takes, for a process's exit.
    pub async fn wait_process(
        &self,
        container_id: &str,
        exec_id: &str,
    ) -> Result<WaitProcessResponse> {
        Ok(self.wire.wait_process(Context::default(), &process(container_id, exec_id)).await?)
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn signal_process(
        &self,
        container_id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let mut request = SignalProcessRequest::new();
        container_id.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.signal = signal;
        request.all = all;
        self.awake(After::Going, self.wire.signal_process(short(), &request)).await?;
        Ok(())
    }

    /// Forgets an exec'd process that has exited.
    pub async fn delete_process(&self, container_id: &str, exec_id: &str) -> Result<()> {
        let request = process(container_id, exec_id);
        self.awake(After::Going, self.wire.delete_process(short(), &request)).await?;
        Ok(())
    }

    /// The container's processes.
    pub async fn list_processes(&self, container_id: &str) -> Result<ListProcessesResponse> {
        let request = container(container_id);
        self.awake(After::Unchanged, self.wire.list_processes(short(), &request)).await
    }

    /// Sets the size of a terminal.
    pub async fn resize_terminal(
        &self,
        container_id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<()> {
        let mut request = ResizeTerminalRequest::new();
        container_id.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.rows = rows;
        request.columns = columns;
        self.awake(After::Unchanged, self.wire.resize_terminal(short(), &request)).await?;
        Ok(())
    }

    /// Freezes a container; with `last`, the only one of the sandbox's that still ran.
    pub async fn pause_container(&self, container_id: &str, last: bool) -> Result<()> {
        let after = if last { After::Still } else { After::Going };
        self.awake(after, self.wire.pause_container(long(), &container(container_id))).await?;
        Ok(())
    }

    /// Lets a paused container go on.
    pub async fn resume_container(&self, container_id: &str) -> Result<()> {
        let request = container(container_id);
        self.awake(After::Going, self.wire.resume_container(long(), &request)).await?;
        Ok(())
    }

    /// Changes a container's limits.
    pub async fn update_container(&self, request: &UpdateContainerRequest) -> Result<()> {
        self.awake(After::Unchanged, self.wire.update_container(short(), request)).await?;
        Ok(())
    }

    /// What a container uses.
    pub async fn stat_container(&self, container_id: &str) -> Result<StatContainerResponse> {
        let request = container(container_id);
        self.awake(After::Unchanged, self.wire.stat_container(short(), &request)).await
    }

    /// Waits, however long it takes, until the out-of-memory killer has struck more often than
    /// `seen`; how often then. Not more often: the container has ended.
    pub async fn wait_out_of_memory(&self, container_id: &str, seen: u64) -> Result<u64> {
        let mut request = WaitOutOfMemoryRequest::new();
        container_id.clone_into(&mut request.container_id);
        request.seen = seen;
        Ok(self.wire.wait_out_of_memory(Context::default(), &request).await?.oom_kills)
    }
}

fn container(id: &str) -> ContainerRequest {
    let mut request = ContainerRequest::new();
    id.clone_into(&mut request.container_id);
    request
}

fn process(container_id: &str, exec_id: &str) -> ProcessRequest {
    let mut request = ProcessRequest::new();
    container_id.clone_into(&mut request.container_id);
    exec_id.clone_into(&mut request.exec_id);
    request
}
