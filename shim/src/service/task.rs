//! The calls of the task service, one after the other.

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskPaused, TaskResumed};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use slog::debug;

use super::convert::{exec_request, process_info, resources, timestamp};
use super::lifecycle::{TaskService, to_the_end};
use super::metrics::metrics;
use crate::error::ServiceError;
use crate::memory;

/// The service is shared with the tasks that outlive a request.
type Service = std::sync::Arc<TaskService>;

#[async_trait]
impl Task for Handle {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        let service = self.service("create", &request.id);
        let pid = to_the_end(async move { service.create_container(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let service = self.service("start", &request.id);
        let started = async move {
            let container = service.container(&request.id)?;
            if request.exec_id.is_empty() {
                if let Some(sandbox) = service.running() {
                    let settled = sandbox.settle_network().await;
                    settled.map_err(|error| ServiceError::from(&error))?;
                }
                container.start().await?;
                memory::give_back_later();
                return Ok(container.init().pid());
            }
            Ok(container.start_exec(&request.exec_id).await?.pid())
        };
        let pid = to_the_end(started).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let container = self.0.container(&request.id)?;
        let state = TaskService::process_state(&container, &request.exec_id)?;
        let stdio = if request.exec_id.is_empty() {
            container.stdio().clone()
        } else {
            let exec = container.exec(&request.exec_id).map_err(ServiceError::from)?;
            exec.request.stdio.clone()
        };
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle().to_string_lossy().into_owned(),
            pid: state.pid,
            status: state.status.into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let container = self.0.container(&request.id)?;
        let exit = container.wait(&request.exec_id).await.map_err(ServiceError::from)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        debug!(self.0.log, "kill"; "container" => &request.id, "exec" => &request.exec_id,
            "signal" => request.signal, "all" => request.all);
        let container = self.0.container(&request.id)?;
        let sent = container.signal(&request.exec_id, request.signal, request.all).await;
        sent.map_err(ServiceError::from)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let service = self.service("delete", &request.id);
        let deleted = async move {
            let deleted = service.delete_process(&request.id, &request.exec_id).await?;
            service.leave();
            Ok(deleted)
        };
        let (pid, exit) = to_the_end(deleted).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let container = self.0.container(&request.id)?;
        let processes = container.processes().await.map_err(ServiceError::from)?;
        let machine = container.init().pid();
        let processes = processes.into_iter().map(|entry| process_info(machine, entry)).collect();
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        let added = exec_request(&request)?;
        container.add_exec(added).map_err(ServiceError::from)?;
        self.0.publisher.publish(TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        });
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        let (rows, columns) = (request.height, request.width);
        container.resize(&request.exec_id, rows, columns).await.map_err(ServiceError::from)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        if request.stdin {
            container.close_input(&request.exec_id).map_err(ServiceError::from)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.connected_pid(&request.id);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        let service = self.service("shutdown", &request.id);
        to_the_end(async move {
            service.end(request.now).await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        let service = self.service("pause", &request.id);
        to_the_end(async move {
            service.container(&request.id)?.pause().await?;
            let event = TaskPaused { container_id: request.id, ..TaskPaused::default() };
            service.publisher.publish(event);
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        let service = self.service("resume", &request.id);
        to_the_end(async move {
            service.container(&request.id)?.resume().await?;
            let event = TaskResumed { container_id: request.id, ..TaskResumed::default() };
            service.publisher.publish(event);
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(ServiceError::Unimplemented("Checkpoint").into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let service = self.service("update", &request.id);
        to_the_end(async move {
            let resources = resources(&request)?;
            service.update(&request.id, resources).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let container = self.0.container(&request.id)?;
        let used = container.statistics().await.map_err(ServiceError::from)?;
        Ok(StatsResponse { stats: Some(metrics(used)).into(), ..StatsResponse::default() })
    }
}

/// The service as ttrpc holds it.
pub struct Handle(pub(super) Service);

impl Handle {
    /// A handle for requests.
    pub fn new(service: Service) -> Self {
        Self(service)
    }

    fn service(&self, call: &'static str, id: &str) -> Service {
        debug!(self.0.log, "{call}"; "container" => id);
        Service::clone(&self.0)
    }
}
