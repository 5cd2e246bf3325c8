//! One process, from its creation to the news of its exit.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slog::{Logger, debug, warn};
use tokio::sync::watch;

use super::out_of_memory::OutOfMemory;
use super::{ContainerError, Follower};
use crate::agent_client::{AgentClient, AgentError};
use crate::io::Streams;
use crate::lock::lock;
use crate::machine::Machine;

/// The exit status of processes whose machine ended under them.
const LOST: u32 = 255;

/// How long after a broken connection the end of the machine is awaited: the one brings the other.
const MACHINE_END: Duration = Duration::from_secs(2);

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It waits to be started.
    Created,
    /// It runs.
    Running,
    /// It stands still, with all of its container.
    Paused,
    /// It has exited.
    Stopped,
}

impl Status {
    /// As in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell says it.
    pub status: u32,
    /// When, by the guest's clock, which the host set.
    pub at: SystemTime,
}

/// What is told as it happens, in this order for each process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// A process was started.
    Started,
    /// The out-of-memory killer struck in the container.
    OutOfMemory,
    /// A process has exited, and its output has been delivered.
    Exited(Exit),
}

/// Who is told. The call must not block: it is made between the happening and its consequences.
pub trait Observer: Send + Sync {
    /// Something happened to process `exec_id` (empty for the init) of `container_id`.
    fn happened(&self, container_id: &str, exec_id: &str, pid: u32, happening: Happening);
}

/// A process that exists in the guest.
pub struct Process {
    container_id: String,
    exec_id: String,
    pid: u32,
    agent: AgentClient,
    streams: Mutex<Option<Arc<Streams>>>,
    started: Mutex<bool>,
    /// Held from before the start until it has been told: an exit is told after it.
    telling: tokio::sync::Mutex<()>,
    exit: watch::Sender<Option<Exit>>,
    observer: Arc<dyn Observer>,
    killer: Arc<OutOfMemory>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Process({}/{})", self.container_id, self.exec_id)
    }
}

impl Process {
    /// Takes on a process that the agent has just made, and follows it to its end.
    pub(super) fn follow(
        names: (&str, &str),
        follower: &Follower,
        streams: Streams,
        killer: &Arc<OutOfMemory>,
    ) -> Arc<Self> {
        let machine = Arc::clone(&follower.machine);
        let process = Arc::new(Self {
            container_id: names.0.to_owned(),
            exec_id: names.1.to_owned(),
            pid: machine.pid(),
            agent: follower.agent.clone(),
            streams: Mutex::new(Some(Arc::new(streams))),
            started: Mutex::new(false),
            telling: tokio::sync::Mutex::new(()),
            exit: watch::Sender::new(None),
            observer: Arc::clone(&follower.observer),
            killer: Arc::clone(killer),
        });
        tokio::spawn(Arc::clone(&process).run(machine, follower.log.clone()));
        process
    }

    /// The process id on the host: the machine's, for all processes in it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where it is in its life; that its container is paused only the container knows.
    pub fn status(&self) -> Status {
        match (self.exit.borrow().is_some(), *lock(&self.started)) {
            (true, _) => Status::Stopped,
            (false, true) => Status::Running,
            (false, false) => Status::Created,
        }
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end. By then its output has been delivered and its exit told.
    pub async fn exited(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        // The sender lives as long as we do.
        ended.ok().flatten().unwrap_or(Exit { status: LOST, at: SystemTime::now() })
    }

    /// Starts the init of a created container.
    pub(super) async fn start(&self) -> Result<(), ContainerError> {
        let telling = self.telling.lock().await;
        match self.status() {
            Status::Created => {}
            status => {
                return Err(ContainerError::Status { action: "start", status: status.name() });
            }
        }
        self.agent.start_container(&self.container_id).await?;
        self.tell_start();
        drop(telling);
        Ok(())
    }

    /// The agent has started it already: says so, before its exit can be told.
    pub(super) async fn started(&self) {
        let telling = self.telling.lock().await;
        self.tell_start();
        drop(telling);
    }

    fn tell_start(&self) {
        *lock(&self.started) = true;
        self.observer.happened(&self.container_id, &self.exec_id, self.pid, Happening::Started);
    }

    /// Sends a signal to it, or with `all` to all of the container.
    pub async fn signal(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
        if self.exit().is_some() {
            return Err(ContainerError::Finished);
        }
        self.agent.signal_process(&self.container_id, &self.exec_id, signal, all).await?;
        Ok(())
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, rows: u32, columns: u32) -> Result<(), ContainerError> {
        self.agent.resize_terminal(&self.container_id, &self.exec_id, rows, columns).await?;
        Ok(())
    }

    /// Ends its standard input once the clients have closed theirs.
    pub fn close_input(&self) {
        if let Some(streams) = &*lock(&self.streams) {
            streams.close_input();
        }
    }

    /// Lets what is left of its output through, within reason, and closes the FIFOs.
    pub(super) async fn close_streams(&self) {
        let streams = lock(&self.streams).take();
        if let Some(streams) = streams {
            streams.finished().await;
        }
    }

    async fn run(self: Arc<Self>, machine: Arc<Machine>, log: Logger) {
        let waited = tokio::select! {
            biased;
            waited = self.agent.wait_process(&self.container_id, &self.exec_id) => waited,
            end = machine.end() => Err(AgentError::Lost(end.reason)),
        };
        let exit = match waited {
            Ok(answer) => {
                let streams = lock(&self.streams).clone();
                if let Some(streams) = streams {
                    streams.delivered(answer.stdout_bytes, answer.stderr_bytes).await;
                }
                self.killer.tell(answer.oom_kills);
                let since = u64::try_from(answer.exited_at_nanoseconds).unwrap_or(0);
                Exit { status: answer.exit_status, at: UNIX_EPOCH + Duration::from_nanos(since) }
            }
            Err(error) => {
                // A connection may break shortly before the machine is seen to end.
                let end = tokio::time::timeout(MACHINE_END, machine.end()).await;
                let reason = end.map_or_else(|_| error.to_string(), |end| end.reason);
                warn!(log, "process lost"; "container" => &self.container_id,
                    "exec" => &self.exec_id, "reason" => reason);
                Exit { status: LOST, at: SystemTime::now() }
            }
        };
        let telling = self.telling.lock().await;
        self.tell(Happening::Exited(exit));
        debug!(log, "process exited"; "container" => &self.container_id,
            "exec" => &self.exec_id, "status" => exit.status);
        self.exit.send_replace(Some(exit));
        drop(telling);
    }

    fn tell(&self, happening: Happening) {
        self.observer.happened(&self.container_id, &self.exec_id, self.pid, happening);
    }
}
