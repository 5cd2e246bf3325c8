//! The sandbox and its containers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use husk_agent_protocols::agent::RepeatChangesRequest;
use slog::{Logger, info, warn};
use tokio::sync::watch;

use crate::container::{
    self, Cgroup, Container, ContainerError, Holder, SharedPids, Validity, Volumes,
};
use crate::host::{Address, Host};
use crate::init::reaper::Reaper;
use crate::machine::{self, MachineError};
use crate::network::{ForwardError, Network, Refused, State, forward, serve_resolver};
use crate::process::{self, Process};
use crate::sandbox::shell::{ShellStart, Shells};
use crate::sandbox::start::{self, Setup, StartError};

/// How long all containers together may take to end at the end.
const END_LIMIT: Duration = Duration::from_secs(3);

/// All that the agent holds.
pub struct Sandbox {
    log: Logger,
    host: Host,
    reaper: Arc<Reaper>,
    started: AtomicBool,
    name: OnceLock<String>,
    validity: OnceLock<Validity>,
    volumes: Arc<Volumes>,
    pids: Holder,
    ending: watch::Sender<bool>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    network: Mutex<Network>,
    shells: Shells,
    repeating: Arc<tokio::sync::Mutex<()>>,
}

impl Sandbox {
    /// A sandbox that waits to be started.
    pub fn new(log: Logger, host: Host, reaper: Arc<Reaper>) -> Arc<Self> {
        let network = Mutex::new(Network::new(host.sys()));
        Arc::new(Self {
            log,
            host,
            reaper,
            started: AtomicBool::new(false),
            name: OnceLock::new(),
            validity: OnceLock::new(),
            volumes: Arc::default(),
            pids: Holder::default(),
            ending: watch::Sender::new(false),
            containers: Mutex::default(),
            network,
            shells: Shells::default(),
            repeating: Arc::default(),
        })
    }

    /// Sets up what the containers share; returns what was refused of the network.
    pub fn start(&self, setup: &Setup) -> Result<Refused, StartError> {
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(StartError::Twice);
        }
        // Only the first caller comes here.
        let _ = self.name.set(setup.name.clone());
        let _ = self.validity.set(Validity::new(setup.validity.clone()));
        let started = start::start(setup, matches!(self.host, Host::Vsock), &mut self.network());
        match &started {
            Ok(_) => info!(self.log, "sandbox: started"),
            Err(error) => warn!(self.log, "sandbox: cannot start"; "error" => %error),
        }
        started
    }

    /// Makes the network what `state` says; returns what was refused of it.
    pub fn update_network(&self, state: State) -> std::io::Result<Refused> {
        let updated = self.network().apply(state);
        if let Err(error) = &updated {
            warn!(self.log, "network: cannot be updated"; "error" => %error);
        }
        updated
    }

    /// Connects a port of the loopback device with the host.
    pub async fn forward(&self, port: u16, ipv6: bool, host: Address) -> Result<(), ForwardError> {
        forward(&self.host, port, ipv6, host).await
    }

    /// Has names asked of the host, at `host`.
    pub async fn serve_resolver(&self, host: Address) -> std::io::Result<()> {
        serve_resolver(&self.host, host).await
    }

    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`Sandbox::start`] was called.
    pub fn started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    /// Brings processors on line or takes them off line, until `count` are; how many were before.
    pub fn set_processors(&self, count: u32) -> Result<u32, MachineError> {
        let before = machine::set_processors(&self.host.sys(), count)?;
        info!(self.log, "machine: processors"; "before" => before, "now" => count);
        Ok(before)
    }

    /// Looks for devices that have come since the guest started.
    pub fn look_for_devices(&self) -> Result<(), MachineError> {
        machine::look_for_devices(&self.host.sys())
    }

    /// Has the kernel raise the events of what the host has changed on volumes.
    pub async fn repeat_changes(&self, request: RepeatChangesRequest) {
        // One call after the other: the share's server knows of one operation at a time.
        let repeating = Arc::clone(&self.repeating).lock_owned().await;
        let repeated = tokio::task::spawn_blocking(move || {
            container::changes::repeat(&request.attribute, &request.changes);
            drop(repeating);
        });
        // It ends as it can.
        let _ = repeated.await;
    }

    /// Asks for the end; [`Sandbox::ending`] tells those who wait for it.
    pub fn ask_end(&self) {
        self.ending.send_replace(true);
    }

    /// Waits until the end is asked for.
    pub async fn ending(&self) {
        // The sender is a part of self, so this ends only when it is true.
        let _ = self.ending.subscribe().wait_for(|ending| *ending).await;
    }

    /// Ends every container.
    pub async fn end(&self) {
        let all = Cgroup::all();
        let ended = async {
            all.kill()?;
            all.emptied().await
        };
        match tokio::time::timeout(END_LIMIT, ended).await {
            Ok(Ok(())) => info!(self.log, "sandbox: ended"),
            Ok(Err(error)) => warn!(self.log, "sandbox: containers are left"; "error" => %error),
            Err(_) => warn!(self.log, "sandbox: containers are left"; "error" => "they do not end"),
        }
        if matches!(self.host, Host::Directory(_)) {
            // In a guest the machine goes, here the machine stays.
            let containers: Vec<_> = self.containers().values().cloned().collect();
            for container in containers {
                let _ = container.cgroup().remove().await;
            }
            let _ = all.remove().await;
        }
    }

    /// Creates a container under a new id.
    pub async fn create(
        &self,
        id: &str,
        spec: &[u8],
        streams: process::Request,
    ) -> Result<Arc<Process>, ContainerError> {
        let validity = self.validity.get().cloned().unwrap_or_default();
        let container = Arc::new(Container::new(id, validity));
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(ContainerError::Exists(format!("container {id}")));
            }
            containers.insert(id.to_owned(), Arc::clone(&container));
        }
        let parts = container::Parts {
            spec,
            streams,
            host: &self.host,
            reaper: &self.reaper,
            volumes: &self.volumes,
            shared_pids: self.shared_pids(),
        };
        let created = container::create(&container, parts).await;
        match &created {
            Ok(init) => info!(self.log, "container: created"; "id" => id, "pid" => init.pid()),
            Err(error) => {
                self.containers().remove(id);
                info!(self.log, "container: not created"; "id" => id, "error" => %error);
            }
        }
        created
    }

    /// The PID namespace that containers share: that of the sandbox's own container, if it has one.
    fn shared_pids(&self) -> SharedPids<'_> {
        let own = self.name.get().and_then(|name| self.container(name).ok());
        match own.map(|own| own.process("")) {
            None => SharedPids::Holder(&self.pids),
            Some(Ok(own)) if own.exited().is_none() => SharedPids::Own(Some(own.pid())),
            Some(_) => SharedPids::Own(None),
        }
    }

    /// Adds a process to a running container.
    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &[u8],
        streams: process::Request,
    ) -> Result<Arc<Process>, ContainerError> {
        let container = self.container(id)?;
        container::exec(&container, exec, process, streams, &self.host, &self.reaper).await
    }

    /// Removes a container.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        let deleted = container::delete(&container).await;
        // One that could not be removed whole cannot be used any more either.
        if !matches!(deleted, Err(ContainerError::State { .. })) {
            self.containers().remove(id);
        }
        deleted
    }

    /// Starts a program of the host's in no container.
    pub async fn start_shell(
        &self,
        id: &str,
        start: ShellStart,
    ) -> Result<Arc<Process>, ContainerError> {
        let started = self.shells.start(id, start, &self.host, &self.reaper).await;
        match &started {
            Ok(process) => info!(self.log, "shell: started"; "id" => id, "pid" => process.pid()),
            Err(error) => info!(self.log, "shell: not started"; "error" => %error),
        }
        started
    }

    /// A process of a container, its init if `exec` is empty; without a container, a shell.
    pub fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, ContainerError> {
        match container {
            "" => self.shells.process(exec),
            id => self.container(id)?.process(exec),
        }
    }

    /// Forgets an exec'd process that has exited; without a container, ends and forgets a shell.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), ContainerError> {
        match container {
            "" => self.shells.delete(exec).await,
            id => self.container(id)?.delete_process(exec),
        }
    }

    /// The container of an id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let found = self.containers().get(id).cloned();
        let short = || id.chars().take(128).collect::<String>();
        found.ok_or_else(|| ContainerError::NotFound(format!("container {}", short())))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
