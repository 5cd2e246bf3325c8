//! Pausing a container, changing its limits, and what it uses.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use husk_agent_protocols::agent::UpdateContainerRequest;
use oci_spec::runtime::LinuxResources;

use super::process::SIGKILL;
use super::{Container, ContainerError, Process, Statistics, Status};
use crate::agent_client::AgentError;
use crate::spec::{SpecError, translate_resources};

/// The inits of a sandbox's containers that have been started, or are being started, and are not paused. Held
/// during every call that makes one of them stand still or go on, so that the machine's processors stand
/// still only if all of them do.
pub(super) type Going = Arc<tokio::sync::Mutex<HashMap<String, Arc<Process>>>>;

impl Container {
    /// Where the process is in its life; with its container it may be paused.
    pub fn status(&self, process: &Process) -> Status {
        match process.status() {
            Status::Running if self.paused.load(Ordering::Acquire) => Status::Paused,
            status => status,
        }
    }

    pub(super) fn demand(
        &self,
        wanted: Status,
        action: &'static str,
    ) -> Result<(), ContainerError> {
        match self.status(self.init()) {
            status if status == wanted => Ok(()),
            status => Err(ContainerError::Status { action, status: status.name() }),
        }
    }

    /// Lets the created init run.
    pub async fn start(&self) -> Result<(), ContainerError> {
        // It goes from now on, as far as pauses of others are concerned: the guest may take its time to start
        // it, and nobody else waits for that.
        let going = &self.follower.going;
        let first =
            going.lock().await.insert(self.id().to_owned(), Arc::clone(self.init())).is_none();
        if let Err(error) = self.init().start().await {
            if first {
                going.lock().await.remove(self.id());
            }
            return Err(self.follower.explain(error));
        }
        if let Err(error) = self.run_hooks_started().await {
            // As runc has it: a container whose hook says no does not stay.
            let _ = self.init().signal(SIGKILL, true).await;
            return Err(error.into());
        }
        Ok(())
    }

    /// Sends a signal to a process; to an added one that is being started once it is there.
    pub async fn signal(
        &self,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        if !exec_id.is_empty() {
            let exec = self.exec(exec_id)?;
            let started =
                tokio::time::timeout(self.follower.bounds.kill_answer, exec.starting.lock());
            match started.await {
                Ok(starting) => drop(starting),
                Err(_) if signal == SIGKILL => {
                    let reason = "a process was to be killed, and the guest does not start it";
                    self.follower.machine.kill_all(reason);
                    return Ok(());
                }
                Err(_) => return Err(AgentError::Silent.into()),
            }
        }
        self.process(exec_id)?.signal(signal, all).await
    }

    /// Sets the size of a process's terminal; of an added one before its start, too.
    pub async fn resize(
        &self,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), ContainerError> {
        if exec_id.is_empty() {
            return self.init().resize(rows, columns).await;
        }
        self.exec(exec_id)?.resize(rows, columns).await
    }

    /// Ends the standard input of a process once the clients have closed theirs; of an added one before
    /// its start, too.
    pub fn close_input(&self, exec_id: &str) -> Result<(), ContainerError> {
        if exec_id.is_empty() {
            self.init().close_input();
        } else {
            self.exec(exec_id)?.close_input();
        }
        Ok(())
    }

    /// Stops all its processes where they are, and the processors if no other container runs.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        let mut going = self.follower.going.lock().await;
        self.demand(Status::Running, "pause")?;
        going.retain(|_, init| init.exit().is_none());
        let last = going.keys().all(|id| id == self.id());
        self.follower.explained(self.follower.agent.pause_container(self.id(), last).await)?;
        going.remove(self.id());
        self.paused.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets a paused container go on.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        let mut going = self.follower.going.lock().await;
        self.demand(Status::Paused, "resume")?;
        self.follower.explained(self.follower.agent.resume_container(self.id()).await)?;
        going.insert(self.id().to_owned(), Arc::clone(self.init()));
        self.paused.store(false, Ordering::Release);
        Ok(())
    }

    /// Changes the limits that `resources` names, and the machine's size with them.
    pub async fn update(&self, mut resources: LinuxResources) -> Result<(), ContainerError> {
        if self.init().status() == Status::Stopped {
            let status = Status::Stopped.name();
            return Err(ContainerError::Status { action: "update", status });
        }
        translate_resources(&mut resources)?;
        let mut request = UpdateContainerRequest::new();
        self.id().clone_into(&mut request.container_id);
        request.resources = serde_json::to_vec(&resources).map_err(SpecError::Json)?;
        let apply = async { Ok(self.follower.agent.update_container(&request).await?) };
        let changed = self.follower.size.with_limits(self.id(), |l| l.change(&resources), apply);
        changed.await.map_err(|error| self.follower.explain(error))
    }

    /// What it uses, as the guest counts it.
    pub async fn statistics(&self) -> Result<Statistics, ContainerError> {
        self.follower.explained(self.follower.agent.stat_container(self.id()).await)
    }
}
