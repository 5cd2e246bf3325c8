//! Each call of the contract: from the wire's types to the agent's, and back.

use std::sync::Arc;

use async_trait::async_trait;
use husk_agent_protocols::agent::{
    AdjustClockRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse, DiskUse,
    Empty, ExecProcessRequest, ExecProcessResponse, FilterRefusal, ForwardPortRequest, HostPort,
    Interface, InterfaceUse, ListProcessesResponse, MemoryVolume, NetworkState, NftablesTable,
    ProcessEntry, ProcessRequest, ReadClockResponse, RepeatChangesRequest, ResizeTerminalRequest,
    ServeResolverRequest, SetProcessorsRequest, SetProcessorsResponse, SignalProcessRequest,
    StartSandboxRequest, StartSandboxResponse, StartShellRequest, StartShellResponse,
    StatContainerResponse, Streams, UpdateContainerRequest, UpdateNetworkResponse,
    WaitOutOfMemoryRequest, WaitOutOfMemoryResponse, WaitProcessResponse, XtablesTable,
};
use husk_agent_protocols::agent_ttrpc::Agent;
use tokio::sync::oneshot;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, Result};

use crate::container::{Container, ContainerError, Counters, Tried, memory};
use crate::host::Address;
use crate::machine::clock::{self, ClockChange};
use crate::machine::{self, interfaces};
use crate::network::filter::{Filter, Refusal, nftables, xtables};
use crate::network::{State, WantedInterface};
use crate::process::{self, Process, SignalError};
use crate::rpc::status::status;
use crate::sandbox::{Sandbox, Setup, ShellStart};

/// The contract's server.
pub struct Service {
    sandbox: Arc<Sandbox>,
}

impl Service {
    /// Serves `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>> {
        Ok(self.sandbox.process(container, exec)?)
    }

    fn started(&self) -> Result<()> {
        match self.sandbox.started() {
            true => Ok(()),
            false => Err(status(Code::FAILED_PRECONDITION, "the sandbox has not been started")),
        }
    }
}

/// Where the host is to be dialled; `None` without a port.
fn address(host: &HostPort) -> Option<Address> {
    let from = (host.from != 0).then_some(host.from);
    (host.port != 0).then_some(Address { port: host.port, from })
}

/// As [`address`], where there must be one.
fn host(host: &HostPort) -> Result<Address> {
    address(host).ok_or_else(|| status(Code::INVALID_ARGUMENT, "the host's port is missing"))
}

/// What is asked of a process's streams.
pub fn streams(streams: &Streams) -> process::Request {
    process::Request {
        input: address(&streams.stdin),
        output: address(&streams.stdout),
        error: address(&streams.stderr),
        terminal: streams.terminal,
        rows: size(streams.rows),
        columns: size(streams.columns),
    }
}

/// What the network is to be.
pub fn state(state: NetworkState) -> State {
    let interface = |one: Interface| WantedInterface {
        device: one.device,
        name: one.name,
        address: one.address,
        mtu: one.mtu,
        down: one.down,
    };
    State {
        interfaces: state.interfaces.into_iter().map(interface).collect(),
        addresses: state.addresses,
        routes: state.routes,
        neighbours: state.neighbours,
        rules: state.rules,
        filter: filter(state.nftables, state.xtables),
    }
}

fn filter(nftables: Vec<NftablesTable>, xtables: Vec<XtablesTable>) -> Filter {
    // Of a family or a kind, the kernel reads one byte; there is none of the last.
    let byte = |number: u32| u8::try_from(number).unwrap_or(u8::MAX);
    let nftables = nftables.into_iter().map(|one| nftables::Table {
        family: byte(one.family),
        name: one.name,
        messages: one.messages.into_iter().map(|one| (byte(one.kind), one.attributes)).collect(),
    });
    let xtables = xtables.into_iter().map(|one| xtables::Table {
        ipv6: one.ipv6,
        name: one.name,
        valid_hooks: one.valid_hooks,
        entry_count: one.entry_count,
        hook_entries: one.hook_entries,
        underflows: one.underflows,
        entries: one.entries,
    });
    Filter { nftables: nftables.collect(), xtables: xtables.collect() }
}

fn refusals(refused: Vec<Refusal>) -> Vec<FilterRefusal> {
    let number = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
    let one = |one: Refusal| FilterRefusal {
        table: number(one.table),
        message: number(one.message),
        error: one.error,
        ..FilterRefusal::default()
    };
    refused.into_iter().map(one).collect()
}

/// What the sandbox is to be.
pub fn setup(request: StartSandboxRequest) -> Setup {
    Setup {
        hostname: request.hostname,
        clock: request.clock_nanoseconds,
        entropy: request.entropy,
        share: request.share_tag,
        validity: request.validity_attribute,
        parameters: request.sysctls,
        shared_memory: request.shared_memory,
        name: request.sandbox_id,
        network: state(request.network.unwrap_or_default()),
    }
}

/// No terminal is larger.
fn size(characters: u32) -> u16 {
    u16::try_from(characters).unwrap_or(u16::MAX)
}

fn disk_use((major, minor, counters): (u64, u64, Counters)) -> DiskUse {
    DiskUse { major, minor, counters, ..Default::default() }
}

fn interface_use(interface: machine::Interface) -> InterfaceUse {
    let machine::Interface { name, received, sent } = interface;
    let [received_bytes, received_packets, received_errors, received_dropped] = received;
    let [sent_bytes, sent_packets, sent_errors, sent_dropped] = sent;
    InterfaceUse {
        name,
        received_bytes,
        received_packets,
        received_errors,
        received_dropped,
        sent_bytes,
        sent_packets,
        sent_errors,
        sent_dropped,
        ..Default::default()
    }
}

/// Signals every process of the container.
fn signal_all(container: &Container, signal: u32) -> Result<()> {
    container.cgroup().signal(signal).map_err(|error| {
        ContainerError::Signal(match error.raw_os_error() {
            Some(libc::EINVAL) => SignalError::Unknown(signal),
            _ => SignalError::Kernel(error),
        })
        .into()
    })
}

#[async_trait]
impl Agent for Service {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let refused = self.sandbox.start(&setup(request))?;
        let name = nix::sys::utsname::uname().map_err(|e| status(Code::INTERNAL, e))?;
        let mut response = StartSandboxResponse::new();
        response.kernel_release = name.release().to_string_lossy().into_owned();
        response.network_refused = refused.texts;
        response.filter_refused = refusals(refused.filter);
        Ok(response)
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: NetworkState,
    ) -> Result<UpdateNetworkResponse> {
        self.started()?;
        let refused = self.sandbox.update_network(state(request));
        let refused = refused.map_err(|error| status(Code::INTERNAL, error))?;
        let mut response = UpdateNetworkResponse::new();
        response.refused = refused.texts;
        response.filter_refused = refusals(refused.filter);
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        self.sandbox.ask_end();
        Ok(Empty::new())
    }

    async fn set_processors(
        &self,
        _: &TtrpcContext,
        request: SetProcessorsRequest,
    ) -> Result<SetProcessorsResponse> {
        let before = self.sandbox.set_processors(request.count)?;
        Ok(SetProcessorsResponse { before, ..Default::default() })
    }

    async fn read_clock(&self, _: &TtrpcContext, _: Empty) -> Result<ReadClockResponse> {
        let nanoseconds = clock::read().map_err(|error| status(Code::INTERNAL, error))?;
        Ok(ReadClockResponse { nanoseconds, ..Default::default() })
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> Result<Empty> {
        let change = ClockChange {
            step: request.step_microseconds,
            slew: request.slew_microseconds,
            frequency: request.frequency,
            tick: request.tick,
            tai: request.tai_offset,
        };
        clock::adjust(&change).map_err(|error| {
            status(
                Code::INVALID_ARGUMENT,
                format!("cannot adjust the clock by {change:?}: {error}"),
            )
        })?;
        Ok(Empty::new())
    }

    async fn look_for_devices(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        self.sandbox.look_for_devices()?;
        Ok(Empty::new())
    }

    async fn repeat_changes(
        &self,
        _: &TtrpcContext,
        request: RepeatChangesRequest,
    ) -> Result<Empty> {
        self.started()?;
        self.sandbox.repeat_changes(request).await;
        Ok(Empty::new())
    }

    async fn make_memory_volume(&self, _: &TtrpcContext, wanted: MemoryVolume) -> Result<Empty> {
        self.started()?;
        let volume = memory::MemoryVolume {
            name: wanted.name,
            mode: wanted.mode,
            uid: wanted.uid,
            gid: wanted.gid,
            size: wanted.size,
            files: wanted.files,
            volume: wanted.volume,
            folder: wanted.folder,
        };
        memory::make(&volume).tried("make memory for a volume")?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse> {
        self.started()?;
        let streams = streams(&request.streams);
        let (sandbox, (answer, created)) = (Arc::clone(&self.sandbox), oneshot::channel());
        // Not cut in half if the call is given up: what nobody knows of is removed when it is whole.
        tokio::spawn(async move {
            let id = &request.container_id;
            let created = sandbox.create(id, &request.spec, streams).await;
            if let Err(Ok(_)) = answer.send(created) {
                let _ = sandbox.delete(id).await;
            }
        });
        let created = created.await.map_err(|error| status(Code::INTERNAL, error))?;
        let mut response = CreateContainerResponse::new();
        response.pid = created?.pid();
        Ok(response)
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.container(&request.container_id)?.start().await?;
        Ok(Empty::new())
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.delete(&request.container_id).await?;
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Result<ExecProcessResponse> {
        let streams = streams(&request.streams);
        let (container, exec) = (&request.container_id, &request.exec_id);
        let process = self.sandbox.exec(container, exec, &request.process, streams).await?;
        let mut response = ExecProcessResponse::new();
        response.pid = process.pid();
        Ok(response)
    }

    async fn start_shell(
        &self,
        _: &TtrpcContext,
        request: StartShellRequest,
    ) -> Result<StartShellResponse> {
        self.started()?;
        let start = ShellStart {
            program: host(&request.program)?,
            streams: streams(&request.streams),
            arguments: request.arguments,
            environment: request.environment,
        };
        let process = self.sandbox.start_shell(&request.shell_id, start).await?;
        Ok(StartShellResponse { pid: process.pid(), ..Default::default() })
    }

    async fn forward_port(&self, _: &TtrpcContext, request: ForwardPortRequest) -> Result<Empty> {
        self.started()?;
        let port = u16::try_from(request.port)
            .map_err(|_| status(Code::INVALID_ARGUMENT, "a TCP port is at most 65535"))?;
        self.sandbox.forward(port, request.ipv6, host(&request.host)?).await?;
        Ok(Empty::new())
    }

    async fn serve_resolver(
        &self,
        _: &TtrpcContext,
        request: ServeResolverRequest,
    ) -> Result<Empty> {
        self.started()?;
        let serving = self.sandbox.serve_resolver(host(&request.host)?).await;
        serving.map_err(|error| {
            status(Code::UNAVAILABLE, format!("names cannot be asked of the host: {error}"))
        })?;
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> Result<WaitProcessResponse> {
        let exited = self.process(&request.container_id, &request.exec_id)?.wait().await;
        let mut response = WaitProcessResponse::new();
        response.exit_status = exited.exit.status;
        response.exited_at_nanoseconds = exited.exit.at;
        response.stdout_bytes = exited.output;
        response.stderr_bytes = exited.error;
        response.oom_kills = exited.out_of_memory;
        Ok(response)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> Result<Empty> {
        if request.all {
            signal_all(&*self.sandbox.container(&request.container_id)?, request.signal)?;
        } else {
            let process = self.process(&request.container_id, &request.exec_id)?;
            process.signal(request.signal).map_err(ContainerError::Signal)?;
        }
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        self.sandbox.delete_process(&request.container_id, &request.exec_id).await?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Result<ListProcessesResponse> {
        let processes = self.sandbox.container(&request.container_id)?.processes()?;
        let mut response = ListProcessesResponse::new();
        response.processes = processes
            .into_iter()
            .map(|(pid, exec_id)| ProcessEntry { pid, exec_id, ..Default::default() })
            .collect();
        Ok(response)
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        self.process(&request.container_id, &request.exec_id)?.close_input();
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> Result<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        match process.resize(size(request.rows), size(request.columns)) {
            Ok(true) => Ok(Empty::new()),
            Ok(false) => Err(status(Code::FAILED_PRECONDITION, "the process has no terminal")),
            Err(error) => Err(status(Code::UNKNOWN, format!("resize the terminal: {error}"))),
        }
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.container(&request.container_id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.sandbox.container(&request.container_id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Result<Empty> {
        self.sandbox.container(&request.container_id)?.update(&request.resources)?;
        Ok(Empty::new())
    }

    async fn stat_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Result<StatContainerResponse> {
        let used = self.sandbox.container(&request.container_id)?.statistics()?;
        Ok(StatContainerResponse {
            cpu_stat: used.cpu,
            memory_stat: used.memory,
            memory_events: used.memory_events,
            memory_current: used.memory_current,
            memory_max: used.memory_max,
            swap_current: used.swap_current,
            swap_max: used.swap_max,
            pids_current: used.pids_current,
            pids_max: used.pids_max,
            io_stat: used.disks.into_iter().map(disk_use).collect(),
            interfaces: interfaces().into_iter().map(interface_use).collect(),
            ..Default::default()
        })
    }

    async fn wait_out_of_memory(
        &self,
        _: &TtrpcContext,
        request: WaitOutOfMemoryRequest,
    ) -> Result<WaitOutOfMemoryResponse> {
        let container = self.sandbox.container(&request.container_id)?;
        let oom_kills = container.out_of_memory_beyond(request.seen).await?;
        Ok(WaitOutOfMemoryResponse { oom_kills, ..Default::default() })
    }
}
