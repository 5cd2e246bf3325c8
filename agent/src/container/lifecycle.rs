//! One container and its processes.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::container::bundle::Bundle;
use crate::container::cgroup::Cgroup;
use crate::container::error::{ContainerError, Tried};
use crate::container::helper::Helper;
use crate::container::spec;
use crate::container::statistics::Statistics;
use crate::container::validity::Validity;
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
    /// Hears from the init until it has executed its command.
    helper: Option<Helper>,
    started: bool,
    paused: bool,
    deleting: bool,
    volumes: Option<HeldVolumes>,
    /// None while the helper is at work on one.
    execs: HashMap<String, Option<Arc<Process>>>,
}

/// How long a started init may take to execute its command, past its startContainer hooks, before it
/// counts as started all the same: runc waits for neither.
const EXECUTE_LIMIT: Duration = Duration::from_secs(10);

/// The place of a process to come under its id; dropping it frees the id.
#[derive(Debug)]
pub(super) struct ExecPlace<'a> {
    container: &'a Container,
    exec: String,
    init: Arc<Process>,
}

impl ExecPlace<'_> {
    /// The init's process id.
    pub(super) fn init(&self) -> u32 {
        self.init.pid()
    }

    /// Puts the process under its id, unless the container has stopped meanwhile: whatever is to end
    /// with the init has ended before this one came.
    pub(super) fn fill(self, process: Arc<Process>) -> Result<Arc<Process>, ContainerError> {
        match self.container.state() {
            State::Running | State::Paused => {
                let place = Some(Arc::clone(&process));
                self.container.parts().execs.insert(self.exec.clone(), place);
                Ok(process)
            }
            _ => {
                // It may have exited by itself.
                let _ = process.signal(libc::SIGKILL.unsigned_abs());
                process.hang_up();
                self.container.refuse("not running")
            }
        }
    }
}

impl Drop for ExecPlace<'_> {
    fn drop(&mut self) {
        let mut parts = self.container.parts();
        if matches!(parts.execs.get(&self.exec), Some(None)) {
            parts.execs.remove(&self.exec);
        }
    }
}

/// A container, from the moment its id is taken until it is deleted.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: Bundle,
    cgroup: Cgroup,
    validity: Validity,
    parts: Mutex<Parts>,
}

impl Container {
    /// A container being created, under a checked id. `validity` is that of the share.
    pub fn new(id: &str, validity: Validity) -> Self {
        Self {
            id: id.to_owned(),
            bundle: Bundle::of(id),
            cgroup: Cgroup::of(id),
            validity,
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

    pub(super) fn validity(&self) -> &Validity {
        &self.validity
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

    /// Lets go of its volumes.
    pub(super) async fn lets_go(&self) {
        let volumes = self.parts().volumes.take();
        if let Some(volumes) = volumes {
            volumes.release().await;
        }
    }

    /// The init is there; `helper` has made it and hears from it.
    pub(super) fn created(&self, init: Arc<Process>, helper: Helper) {
        let mut parts = self.parts();
        (parts.init, parts.helper) = (Some(init), Some(helper));
    }

    /// Lets the created init process execute the container's command, and waits until it has, for
    /// [`EXECUTE_LIMIT`] at most. Fails as runc's text has it if the kernel refuses the command.
    pub async fn start(&self) -> Result<(), ContainerError> {
        if self.state() != State::Created {
            return self.refuse("not created");
        }
        self.validity.pass().await;
        // Another call may have been first.
        if self.state() != State::Created {
            return self.refuse("not created");
        }
        let helper = {
            let mut parts = self.parts();
            parts.started = true;
            parts.helper.take()
        };
        self.bundle.notify().tried("start the container process")?;
        let Some(helper) = helper else { return Ok(()) };
        let executed = tokio::time::timeout(EXECUTE_LIMIT, helper.executed()).await;
        executed.unwrap_or(Ok(()))
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
    pub(super) fn reserve_exec(&self, exec: &str) -> Result<ExecPlace<'_>, ContainerError> {
        if self.state() != State::Running {
            return self.refuse("not running");
        }
        let mut parts = self.parts();
        if parts.execs.contains_key(exec) {
            return Err(ContainerError::Exists(format!("process {exec} of container {}", self.id)));
        }
        // A running container has an init.
        let init = parts.init.clone().ok_or_else(|| ContainerError::NotFound(self.id.clone()))?;
        parts.execs.insert(exec.to_owned(), None);
        Ok(ExecPlace { container: self, exec: exec.to_owned(), init })
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
        let mut parts = self.parts();
        parts.helper = None;
        parts.init.iter().chain(parts.execs.values().flatten()).for_each(|p| p.hang_up());
    }
}
