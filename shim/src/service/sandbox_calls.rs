//! The calls of the sandbox service, one after the other.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc::Result;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::types::platform::Platform;

use super::convert::timestamp;
use super::lifecycle::to_the_end;
use super::metrics::metrics;
use super::sandbox::{SandboxService, State};
use crate::error::ServiceError;

/// The CRI's names of a sandbox's states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service as ttrpc holds it.
pub struct SandboxHandle(Arc<SandboxService>);

impl SandboxHandle {
    /// A handle for requests.
    pub fn new(service: Arc<SandboxService>) -> Self {
        Self(service)
    }

    fn service(&self) -> Arc<SandboxService> {
        Arc::clone(&self.0)
    }
}

#[async_trait]
impl Sandbox for SandboxHandle {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        self.0.create(&request)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let (pid, at) = to_the_end(self.service().start(request.sandbox_id)).await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: Some(timestamp(at)).into(),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> Result<PlatformResponse> {
        self.0.state(&request.sandbox_id)?;
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Platform::default()
        };
        Ok(PlatformResponse { platform: Some(platform).into(), ..PlatformResponse::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        to_the_end(self.service().stop(request.sandbox_id, request.timeout_secs)).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let (exit_status, at) = self.0.wait(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status,
            exited_at: Some(timestamp(at)).into(),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let state = self.0.state(&request.sandbox_id)?;
        let mut status = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            state: NOT_READY.to_owned(),
            ..SandboxStatusResponse::default()
        };
        match state {
            State::None => {}
            State::Created { at } => status.created_at = Some(timestamp(at)).into(),
            State::Ready { at, pid } => {
                READY.clone_into(&mut status.state);
                status.pid = pid;
                status.created_at = Some(timestamp(at)).into();
            }
            State::Ended { created, at, .. } => {
                status.created_at = Some(timestamp(created)).into();
                status.exited_at = Some(timestamp(at)).into();
            }
        }
        if request.verbose {
            let info = serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "shimPid": std::process::id(),
                "machinePid": status.pid,
            });
            // What `crictl inspectp` prints.
            status.info.insert("info".to_owned(), info.to_string());
        }
        Ok(status)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.0.running(&request.sandbox_id, "ping")?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        to_the_end(self.service().shut_down(request.sandbox_id)).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let sandbox = self.0.running(&request.sandbox_id, "measure")?;
        let used = sandbox.statistics().await.map_err(ServiceError::from)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.id = request.sandbox_id;
        metric.data = Some(metrics(used)).into();
        Ok(response)
    }
}
