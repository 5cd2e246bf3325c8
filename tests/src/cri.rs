//! Pods through containerd's CRI plugin, as the kubelet has them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_stage::Stage;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AttachRequest, Capability, ContainerConfig, ContainerMetadata, ContainerStats,
    ContainerStatsFilter, ContainerStatsRequest, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, DnsConfig, ExecRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainerStatsRequest, Mount,
    MountPropagation, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStats, PodSandboxStatsRequest, PodSandboxStatusRequest, PortForwardRequest,
    RemoveContainerRequest, RemovePodSandboxRequest, ReopenContainerLogRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    UpdateContainerResourcesRequest,
};
use tonic::transport::Channel;

use crate::client::SOCKET;
use crate::containerd::{BUSYBOX, Runtime, ctr};
use crate::streaming::Session;
use crate::wait::{PATIENCE, until, until_true};

/// The states of the CRI's containers.
pub const RUNNING: i32 = 1;
/// See [`RUNNING`].
pub const EXITED: i32 = 2;

static NEXT: AtomicU32 = AtomicU32::new(0);
static IMAGES: OnceLock<Result<(), String>> = OnceLock::new();

/// The kubelet's images are in a namespace of their own.
fn images() -> Result<()> {
    let imported = IMAGES.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/images");
        for name in ["busybox.tar", "pause.tar"] {
            let path = folder.join(name).display().to_string();
            ctr(&["--namespace", "k8s.io", "images", "import", &path])
                .map_err(|error| format!("{error:#}"))?;
        }
        Ok(())
    });
    imported.clone().map_err(anyhow::Error::msg)
}

type Client = RuntimeServiceClient<Channel>;

/// A pod; dropping stops and removes it with all its containers.
#[derive(Debug)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    config: PodSandboxConfig,
    tokio: tokio::runtime::Runtime,
    client: Client,
    /// Where its containers' logs are, and what else it needs on the host.
    pub folder: Stage,
}

/// What a pod is to be like; the rest is as the kubelet has it.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Whether its containers see each other's processes.
    pub shared_pids: bool,
    /// Safe kernel parameters.
    pub sysctls: HashMap<String, String>,
    /// The limits of all of it.
    pub limits: Option<LinuxContainerResources>,
    /// The cgroup above those of its parts; empty for none.
    pub cgroup: &'static str,
    /// The name servers of its own; empty for the host's.
    pub servers: Vec<String>,
}

/// A container to be made in a pod.
#[derive(Debug, Default)]
pub struct Inside<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shell line.
    pub line: &'a str,
    /// Folders of the host's and their places.
    pub volumes: Vec<(PathBuf, &'a str)>,
    /// The same, for folders that get the mounts that the host makes in them later.
    pub followed: Vec<(PathBuf, &'a str)>,
    /// Capabilities beside the usual ones, without `CAP_`.
    pub capabilities: Vec<&'a str>,
    /// Its limits.
    pub limits: Option<LinuxContainerResources>,
    /// Whether it has an input that clients can attach to.
    pub stdin: bool,
}

fn namespaces(wanted: &Wanted) -> Option<NamespaceOption> {
    let pid = if wanted.shared_pids { NamespaceMode::Pod } else { NamespaceMode::Container };
    Some(NamespaceOption { pid: pid.into(), ..NamespaceOption::default() })
}

impl Pod {
    /// Runs a pod.
    pub fn run(runtime: Runtime, wanted: &Wanted) -> Result<Self> {
        images()?;
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut client = RuntimeServiceClient::new(
            tokio.block_on(containerd_client::connect(SOCKET)).context("containerd")?,
        );
        let folder = Stage::new_in("/var/lib")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-pod-{number}", runtime.name());
        let security = LinuxSandboxSecurityContext {
            namespace_options: namespaces(wanted),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "tests".to_owned(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: folder.path().display().to_string(),
            dns_config: (!wanted.servers.is_empty())
                .then(|| DnsConfig { servers: wanted.servers.clone(), ..DnsConfig::default() }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: wanted.cgroup.to_owned(),
                security_context: Some(security),
                sysctls: wanted.sysctls.clone(),
                resources: wanted.limits.clone(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: runtime.name().to_owned(),
        };
        let answer = tokio.block_on(client.run_pod_sandbox(request))?.into_inner();
        Ok(Self { id: answer.pod_sandbox_id, config, tokio, client, folder })
    }

    fn call<T, F>(&self, call: impl FnOnce(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        Ok(self.tokio.block_on(call(self.client.clone()))?.into_inner())
    }

    /// Creates a container; its id.
    pub fn create(&self, inside: &Inside<'_>) -> Result<String> {
        let wanted = Wanted {
            shared_pids: self.config.linux.as_ref().is_some_and(|linux| {
                let context = linux.security_context.as_ref();
                let options = context.and_then(|context| context.namespace_options.as_ref());
                options.is_some_and(|options| options.pid == i32::from(NamespaceMode::Pod))
            }),
            ..Wanted::default()
        };
        let volume = |(host, container): &(PathBuf, &str), propagation: MountPropagation| Mount {
            host_path: host.display().to_string(),
            container_path: (*container).to_owned(),
            propagation: propagation.into(),
            ..Mount::default()
        };
        let private =
            inside.volumes.iter().map(|pair| volume(pair, MountPropagation::PropagationPrivate));
        let followed = inside
            .followed
            .iter()
            .map(|pair| volume(pair, MountPropagation::PropagationHostToContainer));
        let security = LinuxContainerSecurityContext {
            namespace_options: namespaces(&wanted),
            capabilities: Some(Capability {
                add_capabilities: inside.capabilities.iter().map(|&name| name.to_owned()).collect(),
                ..Capability::default()
            }),
            ..Default::default()
        };
        let attempt = NEXT.fetch_add(1, Ordering::Relaxed);
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: inside.name.to_owned(), attempt }),
            image: Some(ImageSpec { image: BUSYBOX.to_owned(), ..ImageSpec::default() }),
            command: ["sh", "-c", inside.line].map(str::to_owned).to_vec(),
            mounts: private.chain(followed).collect(),
            log_path: format!("{}.log", inside.name),
            stdin: inside.stdin,
            linux: Some(LinuxContainerConfig {
                resources: inside.limits.clone(),
                security_context: Some(security),
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(self.call(|mut c| async move { c.create_container(request).await })?.container_id)
    }

    /// Starts a created container.
    pub fn start(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.call(|mut c| async move { c.start_container(request).await }).map(drop)
    }

    /// Creates and starts a container; its id.
    pub fn container(&self, inside: &Inside<'_>) -> Result<String> {
        let id = self.create(inside)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Stops a container, with SIGKILL after that many seconds.
    pub fn stop(&self, id: &str, seconds: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: seconds };
        self.call(|mut c| async move { c.stop_container(request).await }).map(drop)
    }

    /// Removes a container, whatever it does.
    pub fn remove(&self, id: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.call(|mut c| async move { c.remove_container(request).await }).map(drop)
    }

    /// Runs a shell line in a container.
    pub fn exec(&self, id: &str, line: &str, seconds: i64) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: ["sh", "-c", line].map(str::to_owned).to_vec(),
            timeout: seconds,
        };
        self.call(|mut c| async move { c.exec_sync(request).await })
    }

    /// The trimmed output of a shell line that ends with 0.
    pub fn shell(&self, id: &str, line: &str) -> Result<String> {
        let ran = self.exec(id, line, 0)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        ensure!(ran.exit_code == 0, "{line}: {} {}", ran.exit_code, text(&ran.stderr));
        Ok(text(&ran.stdout))
    }

    /// What the kubelet is told of a container.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.call(|mut c| async move { c.container_status(request).await })?;
        answer.status.context("no status")
    }

    /// Waits for the end of a container.
    pub fn ended(&self, id: &str) -> Result<ContainerStatus> {
        until("the container ends", PATIENCE, || {
            let status = self.status(id)?;
            Ok((status.state == EXITED).then_some(status))
        })
    }

    /// What a container uses.
    pub fn stats(&self, id: &str) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let answer = self.call(|mut c| async move { c.container_stats(request).await })?;
        answer.stats.context("no stats")
    }

    /// What the pod's containers use, by their ids, in one listing.
    pub fn list_stats(&self) -> Result<Vec<ContainerStats>> {
        let filter = ContainerStatsFilter { pod_sandbox_id: self.id.clone(), ..Default::default() };
        let request = ListContainerStatsRequest { filter: Some(filter) };
        Ok(self.call(|mut c| async move { c.list_container_stats(request).await })?.stats)
    }

    /// What the pod uses.
    pub fn sandbox_stats(&self) -> Result<PodSandboxStats> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let answer = self.call(|mut c| async move { c.pod_sandbox_stats(request).await })?;
        answer.stats.context("no stats")
    }

    /// Runs a shell line in a container with its streams here.
    pub fn exec_stream(&self, id: &str, line: &str, terminal: bool) -> Result<Session<'_>> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            cmd: ["sh", "-c", line].map(str::to_owned).to_vec(),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
        };
        let url = self.call(|mut c| async move { c.exec(request).await })?.url;
        Session::open(&self.tokio, &url)
    }

    /// Has a container's streams here.
    pub fn attach(&self, id: &str) -> Result<Session<'_>> {
        let request = AttachRequest {
            container_id: id.to_owned(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..AttachRequest::default()
        };
        let url = self.call(|mut c| async move { c.attach(request).await })?.url;
        Session::open(&self.tokio, &url)
    }

    /// A connection to a port of the pod's: channel 0 is the data, channel 1 the error; each begins
    /// with the port's number in two bytes.
    pub fn port_forward(&self, port: u16) -> Result<Session<'_>> {
        let request =
            PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![port.into()] };
        let url = self.call(|mut c| async move { c.port_forward(request).await })?.url;
        Session::open(&self.tokio, &url)
    }

    /// Changes a container's limits.
    pub fn update(&self, id: &str, limits: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(limits),
            ..Default::default()
        };
        self.call(|mut c| async move { c.update_container_resources(request).await }).map(drop)
    }

    /// Has a container's log opened anew.
    pub fn reopen_log(&self, id: &str) -> Result<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        self.call(|mut c| async move { c.reopen_container_log(request).await }).map(drop)
    }

    /// Whether the sandbox is ready.
    pub fn is_ready(&self) -> Result<bool> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.call(|mut c| async move { c.pod_sandbox_status(request).await })?;
        Ok(answer.status.context("no status")?.state == 0)
    }

    /// The lines of a container's log, as `stream text`.
    pub fn log(&self, name: &str) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")))?;
        let line = |line: &str| {
            let mut words = line.splitn(4, ' ').skip(1);
            Some(format!("{} {}", words.next()?, words.nth(1)?))
        };
        Ok(text.lines().filter_map(line).collect())
    }

    /// Waits until a container's log has such a line.
    pub fn logs(&self, name: &str, wanted: &str) -> Result<()> {
        let there = until_true("the line is there", PATIENCE, || {
            Ok(self.log(name).is_ok_and(|lines| lines.iter().any(|line| line == wanted)))
        });
        there.with_context(|| format!("no line {wanted:?} in {:?}", self.log(name)))
    }

    /// Waits for a containerd that has come again.
    pub fn connect_again(&mut self) -> Result<()> {
        let since = Instant::now();
        loop {
            let connected = self.tokio.block_on(containerd_client::connect(SOCKET))?;
            self.client = RuntimeServiceClient::new(connected);
            // The CRI plugin comes up last.
            match self.is_ready() {
                Ok(_) => return Ok(()),
                Err(error) if since.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Stops the pod.
    pub fn stop_sandbox(&self) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.call(|mut c| async move { c.stop_pod_sandbox(request).await }).map(drop)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.stop_sandbox();
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        let _ = self.call(|mut c| async move { c.remove_pod_sandbox(request).await });
    }
}
