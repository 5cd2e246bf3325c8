//! One container and its processes.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::container::bundle::Bundle;
use crate::container::cgroup::Cgroup;
use crate::container::error::{ContainerError, Tried};
use crate::container::spec;
use crate::container::statistics::Statistics;
use crate::container::volumes::HeldVolumes;
use crate::process::Process;

/// The states of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The helper is at work.
    Creating,
    /// The init process waits to be let go.
    Created,
    /// The init process runs.
    Running,
    /// Its processes stand still.
    Paused,
    /// The init process has exited.
    Stopped,
    /// Being removed.
    Deleting,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Creating => "being created",
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Deleting => "being deleted",
        })
    }
}

#[derive(Debug, Default)]
struct Parts {
    init: Option<Arc<Process>>,
    started: bool,
    paused: bool,
    deleting: bool,
    volumes: Option<HeldVolumes>,
    /// None while the helper is at work on one.
    execs: HashMap<String, Option<Arc<Process>>>,
}

/// A container, from the moment its id is taken until it is deleted.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: Bundle,
    cgroup: Cgroup,
    parts: Mutex<Parts>,
}

impl Container {
    /// A container being created, under a checked id.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            bundle: Bundle::of(id),
            cgroup: Cgroup::of(id),
            parts: Mutex::default(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is now.
    pub fn state(&self) -> State {
        let parts = self.parts();
        match &parts.init {
            _ if parts.deleting => State::Deleting,
            None => State::Creating,
            Some(init) if init.exited().is_some() => State::Stopped,
            Some(_) if parts.paused => State::Paused,
            Some(_) if parts.started => State::Running,
            Some(_) => State::Created,
        }
    }

    fn refuse<T>(&self, need: &'static str) -> Result<T, ContainerError> {
        Err(ContainerError::State { id: self.id.clone(), state: self.state(), need })
    }

    pub(super) fn holds(&self, volumes: HeldVolumes) {
        self.parts().volumes = Some(volumes);
    }

    pub(super) fn lets_go(&self) {
        self.parts().volumes = None;
    }

    pub(super) fn created(&self, init: Arc<Process>) {
        self.parts().init = Some(init);
    }

    /// Lets the created init process execute the container's command.
    pub fn start(&self) -> Result<(), ContainerError> {
        if self.state() != State::Created {
            return self.refuse("not created");
        }
        self.parts().started = true;
        self.bundle.notify().tried("start the container process")
    }

    /// Stops every process of a running container where it is.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        if self.state() != State::Running {
            return self.refuse("not running");
        }
        self.cgroup.freeze(true).await.tried("pause the container")?;
        self.parts().paused = true;
        Ok(())
    }

    /// Lets a paused container go on.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        if self.state() != State::Paused {
            return self.refuse("not paused");
        }
        self.cgroup.freeze(false).await.tried("resume the container")?;
        self.parts().paused = false;
        Ok(())
    }

    /// Changes its limits to those that the JSON of `linux.resources` names.
    pub fn update(&self, resources: &[u8]) -> Result<(), ContainerError> {
        let resources = spec::read_limits(resources)?;
        match self.state() {
            State::Created | State::Running | State::Paused => {
                self.cgroup.limit(&resources).tried("update the container")
            }
            _ => self.refuse("not running"),
        }
    }

    /// Waits until the out-of-memory killer has struck in it more often than `seen`, or it has
    /// stopped; how often then.
    pub async fn out_of_memory_beyond(&self, seen: u64) -> Result<u64, ContainerError> {
        let init = self.process("")?;
        tokio::select! {
            kills = self.cgroup.out_of_memory_beyond(seen) => {
                kills.tried("await the out-of-memory killer")
            }
            exited = init.wait() => Ok(exited.out_of_memory),
        }
    }

    /// What it uses.
    pub fn statistics(&self) -> Result<Statistics, ContainerError> {
        Statistics::read(self.cgroup.path()).tried("read the container's statistics")
    }

    /// Marks it as being deleted; it must have stopped, or never have been started.
    pub(super) fn begin_delete(&self) -> Result<(), ContainerError> {
        match self.state() {
            State::Created | State::Stopped => {
                self.parts().deleting = true;
                Ok(())
            }
            _ => self.refuse("not stopped"),
        }
    }

    /// Takes `exec` for a process to come; the container must be running.
    pub(super) fn reserve_exec(&self, exec: &str) -> Result<Arc<Process>, ContainerError> {
        if self.state() != State::Running {
            return self.refuse("not running");
        }
        let mut parts = self.parts();
        if parts.execs.contains_key(exec) {
            return Err(ContainerError::Exists(format!("process {exec} of container {}", self.id)));
        }
        parts.execs.insert(exec.to_owned(), None);
        // A running container has an init.
        parts.init.clone().ok_or_else(|| ContainerError::NotFound(self.id.clone()))
    }

    /// Puts the process under its reserved id, or frees the id again.
    pub(super) fn fill_exec(&self, exec: &str, process: Option<Arc<Process>>) {
        let mut parts = self.parts();
        match process {
            Some(process) => parts.execs.insert(exec.to_owned(), Some(process)),
            None => parts.execs.remove(exec),
        };
    }

    /// The process of an exec id, or init if that is empty.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, ContainerError> {
        let parts = self.parts();
        let found = match exec {
            "" => parts.init.clone(),
            _ => parts.execs.get(exec).cloned().flatten(),
        };
        found.ok_or_else(|| match exec {
            "" => ContainerError::NotFound(format!("process of container {}", self.id)),
            _ => ContainerError::NotFound(format!("process {exec} of container {}", self.id)),
        })
    }

    /// Forgets an exec'd process that has exited, and closes its streams.
    pub fn delete_process(&self, exec: &str) -> Result<(), ContainerError> {
        let process = self.process(exec)?;
        if exec.is_empty() || process.exited().is_none() {
            return Err(ContainerError::State {
                id: self.id.clone(),
                state: self.state(),
                need: "and only an exec'd process that has exited can be deleted",
            });
        }
        process.hang_up();
        self.parts().execs.remove(exec);
        Ok(())
    }

    /// Its processes, with the exec id of those that have one.
    pub fn processes(&self) -> Result<Vec<(u32, String)>, ContainerError> {
        let pids = self.cgroup.processes().tried("list the container's processes")?;
        let parts = self.parts();
        let known: HashMap<u32, &String> = parts
            .execs
            .iter()
            .filter_map(|(id, process)| process.as_ref().map(|p| (p.pid(), id)))
            .collect();
        let name = |pid| known.get(&pid).map(|id| (*id).clone()).unwrap_or_default();
        Ok(pids.into_iter().map(|pid| (pid, name(pid))).collect())
    }

    /// Closes the streams of all its processes.
    pub(super) fn hang_up(&self) {
        let parts = self.parts();
        parts.init.iter().chain(parts.execs.values().flatten()).for_each(|p| p.hang_up());
    }
}
