//! One process, from its creation to the news of its exit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slog::{Logger, debug, warn};
use tokio::sync::watch;
use tokio::time::timeout;

use super::out_of_memory::OutOfMemory;
use super::{Bounds, ContainerError, Follower};
use crate::agent_client::{AgentClient, AgentError};
use crate::io::Streams;
use crate::lock::lock;
use crate::machine::Machine;

/// The exit status of processes whose machine ended under them.
const LOST: u32 = 255;

/// The signal that no process can refuse.
pub(super) const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// How long after a broken connection the end of the machine is awaited: the one brings the other. Else
/// the guest has broken it, and its machine is ended.
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
    /// When, by the guest's clock: between the process's creation and now by the host's.
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
    machine: Arc<Machine>,
    agent: AgentClient,
    streams: Mutex<Option<Arc<Streams>>>,
    started: Mutex<bool>,
    /// Held from before the start until it has been told: an exit is told after it.
    telling: tokio::sync::Mutex<()>,
    /// Whether it was sent SIGKILL, with which the machine may end.
    killed: AtomicBool,
    /// Whether the guest has told of its end; its output may still be on the way.
    gone: watch::Sender<bool>,
    exit: watch::Sender<Option<Exit>>,
    created: SystemTime,
    bounds: Bounds,
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
            machine,
            agent: follower.agent.clone(),
            streams: Mutex::new(Some(Arc::new(streams))),
            started: Mutex::new(false),
            telling: tokio::sync::Mutex::new(()),
            killed: AtomicBool::new(false),
            gone: watch::Sender::new(false),
            exit: watch::Sender::new(None),
            created: SystemTime::now(),
            bounds: follower.bounds,
            observer: Arc::clone(&follower.observer),
            killer: Arc::clone(killer),
        });
        tokio::spawn(Arc::clone(&process).run(follower.log.clone()));
        process
    }

    /// The process id on the host: the machine's, for all processes in it.
    pub fn pid(&self) -> u32 {
        self.machine.pid()
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
        self.observer.happened(&self.container_id, &self.exec_id, self.pid(), Happening::Started);
    }

    /// Sends a signal to it, or with `all` to all of the container.
    pub async fn signal(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
        if self.exit().is_some() {
            return Err(ContainerError::Finished);
        }
        if signal == SIGKILL {
            return self.kill(all).await;
        }
        let names = (&self.container_id, &self.exec_id);
        Ok(self.agent.signal_process(names.0, names.1, signal, all).await?)
    }

    /// Sends SIGKILL, which no guest can refuse: one that does not answer, or does not let go of the
    /// process, loses its machine, and all other processes are killed with it.
    async fn kill(&self, all: bool) -> Result<(), ContainerError> {
        self.killed.store(true, Ordering::Relaxed);
        let sent = self.agent.signal_process(&self.container_id, &self.exec_id, SIGKILL, all);
        let sent = timeout(self.bounds.kill_answer, sent).await;
        match sent.unwrap_or(Err(AgentError::Silent)) {
            Err(error @ (AgentError::Silent | AgentError::Lost(_))) => {
                let reason = format!("a process was to be killed, and {error}");
                self.machine.kill_all(&reason);
                Ok(())
            }
            // One that is refused has ended already, or so the guest says: that shows as well.
            sent => {
                tokio::spawn(self.see_it_gone());
                Ok(sent?)
            }
        }
    }

    /// Kills all of the machine if the guest does not let go of a process that was killed.
    fn see_it_gone(&self) -> impl Future<Output = ()> + use<> {
        let (mut gone, machine) = (self.gone.subscribe(), Arc::clone(&self.machine));
        let limit = self.bounds.kill_end;
        async move {
            if timeout(limit, gone.wait_for(|gone| *gone)).await.is_err() {
                machine.kill_all("a process was killed, and did not end");
            }
        }
    }

    /// Waits for the end of a process that the guest has been told to end with its container.
    pub(super) async fn exited_by_force(&self) -> Exit {
        if self.exit().is_none() {
            self.killed.store(true, Ordering::Relaxed);
            self.see_it_gone().await;
        }
        self.exited().await
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
            streams.end_logger().await;
        }
    }

    async fn run(self: Arc<Self>, log: Logger) {
        let waited = tokio::select! {
            biased;
            waited = self.agent.wait_process(&self.container_id, &self.exec_id) => waited,
            end = self.machine.end() => Err(AgentError::Lost(end.reason)),
        };
        self.gone.send_replace(true);
        let exit = match waited {
            Ok(answer) => {
                let streams = lock(&self.streams).clone();
                if let Some(streams) = streams {
                    streams.delivered(answer.stdout_bytes, answer.stderr_bytes).await;
                }
                self.killer.tell(answer.oom_kills);
                let since = u64::try_from(answer.exited_at_nanoseconds).unwrap_or(0);
                let at = UNIX_EPOCH + Duration::from_nanos(since);
                // Of two processes' times the host's clock is the judge.
                Exit { status: answer.exit_status, at: at.max(self.created).min(SystemTime::now()) }
            }
            Err(error) => {
                // A connection may break shortly before the machine is seen to end.
                let end = timeout(MACHINE_END, self.machine.end()).await;
                let (reason, signal) = match (end, &error) {
                    (Ok(end), _) => (end.reason, end.signal),
                    (Err(_), AgentError::Refused { .. }) => (error.to_string(), None),
                    (Err(_), AgentError::Silent | AgentError::Lost(_)) => {
                        // Or its processes would go on with nobody to tell of them.
                        self.machine.give_up(&error.to_string());
                        let end = self.machine.end().await;
                        (end.reason, end.signal)
                    }
                };
                warn!(log, "process lost"; "container" => &self.container_id,
                    "exec" => &self.exec_id, "reason" => reason);
                let signal = signal.or(self.killed.load(Ordering::Relaxed).then_some(SIGKILL));
                let status = signal.map_or(LOST, |signal| 128 + signal);
                Exit { status, at: SystemTime::now() }
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
        self.observer.happened(&self.container_id, &self.exec_id, self.pid(), happening);
    }
}
