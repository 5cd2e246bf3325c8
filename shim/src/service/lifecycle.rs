//! The state behind the task service: the sandbox, and whether the shim is to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, Status};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use containerd_shim_protos::ttrpc;
use husk_runtime::container::{Container, ContainerError, Exit};
use husk_runtime::sandbox::Sandbox;
use oci_spec::runtime::LinuxResources;
use slog::{Logger, info, warn};
use tokio::sync::watch;

use super::convert::{create_request, timestamp};
use crate::boot::Booted;
use crate::error::{ServiceError, chain};
use crate::publisher::Publisher;

/// How long a sandbox without containers waits for its engine to end it, once that has asked for it.
const LEAVING: Duration = Duration::from_secs(5);

/// The task service of one sandbox.
pub struct TaskService {
    sandbox: watch::Receiver<Booted>,
    pub(super) publisher: Publisher,
    pub(super) log: Logger,
    ended: watch::Sender<bool>,
    /// Whether the engine has asked for the end while there were containers: nobody asks again for a pod
    /// whose pause container went first.
    leaving: AtomicBool,
    /// The sandbox that stays when it is empty, until the sandbox service ends it.
    kept: OnceLock<String>,
}

/// What is known of a process.
pub(super) struct ProcessState {
    pub(super) status: Status,
    pub(super) pid: u32,
    pub(super) exit: Option<Exit>,
}

impl TaskService {
    /// Over a sandbox that may still boot.
    pub fn new(sandbox: watch::Receiver<Booted>, publisher: Publisher, log: Logger) -> Self {
        let (ended, kept) = (watch::Sender::new(false), OnceLock::new());
        Self { sandbox, publisher, log, ended, leaving: AtomicBool::new(false), kept }
    }

    /// Waits until the shim is to end; by then everything has been cleared up.
    pub async fn shut_down(&self) {
        // The sender is ours: it does not go away.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Ends the sandbox, if there is one, and clears up.
    pub async fn stop(&self) {
        if let Some(sandbox) = self.running() {
            sandbox.stop().await;
        }
    }

    /// From here on the sandbox `id` is the sandbox service's to end.
    pub(super) fn keep(&self, id: &str) {
        // There is one sandbox in a shim.
        let _ = self.kept.set(id.to_owned());
    }

    /// The process id of what goes by that name: a container, or the sandbox that is kept; 0 if there
    /// is nothing of that name. containerd asks for it when it connects to a shim again.
    pub(super) fn connected_pid(&self, id: &str) -> u32 {
        match self.container(id) {
            Ok(container) => container.init().pid(),
            Err(_) if self.kept.get().is_some_and(|kept| kept == id) => {
                self.running().map_or(0, |sandbox| sandbox.pid())
            }
            Err(_) => 0,
        }
    }

    /// Ends everything if no container is left (or `now`), unless that is the sandbox service's.
    pub(super) async fn end(&self, now: bool) {
        if self.kept.get().is_some() {
            return;
        }
        if !self.is_empty() && !now {
            self.leaving.store(true, Ordering::Relaxed);
            return;
        }
        self.finish().await;
    }

    fn is_empty(&self) -> bool {
        self.running().is_none_or(|sandbox| sandbox.is_empty())
    }

    /// Ends everything in a while if the engine has wanted that before and the last container has just
    /// gone. The engine may ask again meanwhile, or create another one.
    pub(super) fn leave(self: &Arc<Self>) {
        let leaves = |service: &Self| service.leaving.load(Ordering::Relaxed) && service.is_empty();
        if !leaves(self) {
            return;
        }
        let service = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(LEAVING).await;
            if leaves(&service) {
                info!(service.log, "the last container of a sandbox that was to end is deleted");
                service.finish().await;
            }
        });
    }

    /// Ends everything.
    pub(super) async fn finish(&self) {
        self.stop().await;
        self.ended.send_replace(true);
    }

    /// The sandbox once it has booted, or why it has not.
    pub(super) async fn booted(&self) -> Result<Arc<Sandbox>, ServiceError> {
        let mut sandbox = self.sandbox.clone();
        let booted = sandbox.wait_for(Option::is_some).await;
        match booted.as_deref() {
            Ok(Some(Ok(sandbox))) => Ok(Arc::clone(sandbox)),
            Ok(Some(Err(error))) => Err(ServiceError::from(&**error)),
            Ok(None) | Err(_) => Err(ServiceError::Invalid("the shim is ending".to_owned())),
        }
    }

    /// The sandbox if it is there now.
    pub(super) fn running(&self) -> Option<Arc<Sandbox>> {
        match &*self.sandbox.borrow() {
            Some(Ok(sandbox)) => Some(Arc::clone(sandbox)),
            _ => None,
        }
    }

    /// A container; without a sandbox there is none.
    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        match self.running() {
            Some(sandbox) => Ok(sandbox.container(id)?),
            None => Err(ContainerError::NoContainer(id.to_owned()).into()),
        }
    }

    /// Changes a container's limits.
    pub(super) async fn update(
        &self,
        id: &str,
        resources: LinuxResources,
    ) -> Result<(), ServiceError> {
        match self.running() {
            Some(sandbox) => Ok(sandbox.update(id, resources).await?),
            None => Err(ContainerError::NoContainer(id.to_owned()).into()),
        }
    }

    /// What is known of a process.
    pub(super) fn process_state(
        container: &Container,
        exec_id: &str,
    ) -> Result<ProcessState, ServiceError> {
        let process = if exec_id.is_empty() {
            Some(Arc::clone(container.init()))
        } else {
            container.exec(exec_id)?.process()
        };
        Ok(match process {
            None => ProcessState { status: Status::CREATED, pid: 0, exit: None },
            Some(process) => ProcessState {
                status: super::convert::status(container.status(&process)),
                pid: process.pid(),
                exit: process.exit(),
            },
        })
    }

    /// Creates a container and says so; returns its process id on the host.
    pub(super) async fn create_container(
        &self,
        request: CreateTaskRequest,
    ) -> Result<u32, ServiceError> {
        self.leaving.store(false, Ordering::Relaxed);
        let (wanted, unknown) = create_request(&request).await?;
        if !unknown.is_empty() {
            let fields = unknown.join(", ");
            warn!(self.log, "fields of the OCI spec ignored: this version does not know them";
                "container" => &request.id, "fields" => fields);
        }
        let sandbox = self.booted().await?;
        let container = sandbox.create_container(wanted).await.inspect_err(|error| {
            warn!(self.log, "container not created"; "container" => &request.id,
                "error" => chain(error));
        })?;
        let pid = container.init().pid();
        info!(self.log, "container created"; "container" => &request.id);
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..TaskIO::default()
        };
        self.publisher.publish(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(io).into(),
            checkpoint: request.checkpoint,
            pid,
            ..TaskCreate::default()
        });
        Ok(pid)
    }

    /// Deletes a container or an added process; its process id and how it ended.
    pub(super) async fn delete_process(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<(u32, Option<Exit>), ServiceError> {
        let container = self.container(id)?;
        let pid = container.init().pid();
        if !exec_id.is_empty() {
            return Ok((pid, container.delete_exec(exec_id).await?));
        }
        let sandbox = self.running().ok_or_else(|| ContainerError::NoContainer(id.to_owned()))?;
        let exit = sandbox.delete_container(id).await?;
        info!(self.log, "container deleted"; "container" => id);
        self.publisher.publish(TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskDelete::default()
        });
        Ok((pid, Some(exit)))
    }
}

/// Runs `work` to its end even if the request is given up: half a creation would be left behind.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(ttrpc::Error::from),
        Err(error) => Err(ttrpc::Error::Others(format!("the shim failed: {}", chain(&error)))),
    }
}
