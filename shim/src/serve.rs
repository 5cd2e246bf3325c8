//! The shim itself: boots the sandbox and serves containerd's requests until it is shut down.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::asynchronous::Server;
use husk_configuration::{Configuration, ConfigurationError};
use husk_runtime::apart;
use husk_runtime::container::HostMounts;
use husk_runtime::machine::NetworkNamespace;
use husk_runtime::resource::Limits;
use husk_runtime::sandbox::{SandboxError, SandboxRequest};
use husk_runtime::spec::{Membership, is_sandbox_sysctl};
use husk_runtime::state;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources};
use serde::Deserialize;
use slog::{Level, Logger, error, info};
use tokio::signal::unix::{SignalKind, signal};

use crate::address::socket_path;
use crate::arguments::Flags;
use crate::boot::{Blank, Booter};
use crate::connections::Connections;
use crate::publisher::Publisher;
use crate::service::{Announcer, Handle, SandboxHandle, SandboxService, TaskService};
use crate::{daemon, log, memory};

/// The service's name in version 3 of the task API, and in version 2: the messages are the same.
const TASK_SERVICES: (&str, &str) = ("containerd.task.v3.Task", "containerd.task.v2.Task");

/// How long answers on their way out are waited for at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// How long a client may take to hang up once it has the last answer.
const HANGING_UP: Duration = Duration::from_secs(1);

/// As much of the bundle's spec as the sandbox is made from.
#[derive(Debug, Default, Deserialize)]
pub struct SandboxSpec {
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    linux: SandboxLinux,
    #[serde(default)]
    mounts: Vec<SandboxMount>,
    /// There is one in a container's bundle. A sandbox's own may have none, or no spec at all.
    process: Option<SandboxProcess>,
}

#[derive(Debug, Default, Deserialize)]
pub struct SandboxProcess {
    #[serde(default, rename = "oomScoreAdj")]
    oom_score_adj: Option<i32>,
    capabilities: Option<SandboxCapabilities>,
}

#[derive(Debug, Default, Deserialize)]
struct SandboxCapabilities {
    bounding: Option<Vec<String>>,
}

impl SandboxProcess {
    /// Whether the process may make files immutable and append-only.
    fn has_immutable_flags(&self) -> bool {
        let bounding = self.capabilities.as_ref().and_then(|sets| sets.bounding.as_ref());
        bounding.is_some_and(|names| names.iter().any(|name| name == "CAP_LINUX_IMMUTABLE"))
    }
}

#[derive(Debug, Default, Deserialize)]
struct SandboxMount {
    #[serde(default)]
    destination: PathBuf,
    #[serde(default)]
    source: PathBuf,
}

impl SandboxMount {
    /// How large the memory is that the engine has laid out for a pod to share, if this is it.
    fn shared_memory(&self) -> Option<u64> {
        if self.destination != Path::new("/dev/shm") || !self.source.is_absolute() {
            return None;
        }
        let size = nix::sys::statvfs::statvfs(&self.source).ok()?;
        Some(size.blocks().saturating_mul(size.fragment_size()))
    }

    fn is_resolver_file(&self) -> bool {
        self.destination == Path::new("/etc/resolv.conf")
    }
}

#[derive(Debug, Default, Deserialize)]
struct SandboxLinux {
    #[serde(default)]
    sysctl: BTreeMap<String, String>,
    #[serde(default, rename = "cgroupsPath")]
    cgroups_path: Option<String>,
    #[serde(default)]
    namespaces: Vec<LinuxNamespace>,
    resources: Option<LinuxResources>,
}

/// Serves until containerd shuts the shim down.
pub fn serve(flags: &Flags) -> anyhow::Result<()> {
    memory::share_one_heap();
    let (listener, mounts) = daemon::settle()?;
    let mounts = HostMounts(Some(Arc::new(mounts)));
    let settings = Some(Path::new(&flags.configuration)).filter(|path| *path != Path::new(""));
    let configuration = Configuration::load(settings);
    let level = match &configuration {
        _ if flags.debug => Level::Debug,
        Ok(configuration) => configuration.log.level.as_str().parse().unwrap_or(Level::Info),
        Err(_) => Level::Info,
    };
    let log = log::logger(Path::new("log"), level, &flags.id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(2)
        .build()
        .context("event loop")?;
    let result = runtime.block_on(run(flags, listener, configuration, mounts, &log));
    if let Err(error) = &result {
        error!(log, "shim failed: {error:#}");
    }
    result
}

async fn run(
    flags: &Flags,
    listener: UnixListener,
    configuration: Result<Configuration, ConfigurationError>,
    mounts: HostMounts,
    log: &Logger,
) -> anyhow::Result<()> {
    let ttrpc_address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let publisher = Publisher::new(&ttrpc_address, &flags.namespace, log.clone());
    let socket = socket_path(&flags.socket);
    let blank = Blank {
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        socket: socket.clone(),
        configuration,
        mounts,
    };
    let (booter, sandbox) =
        Booter::new(blank, Arc::new(Announcer::new(publisher.clone())), log.clone());
    match apart::opened(|| Ok(bundle_spec(Path::new("config.json")))).await {
        // Nothing to run: a client is going to ask for a sandbox.
        Ok(Ok(SandboxSpec { process: None, .. })) => {}
        spec => {
            booter.begin(|blank| request(blank, spec.map_err(SandboxError::Read)??));
        }
    }
    let booter = Arc::new(booter);
    let service = Arc::new(TaskService::new(sandbox, publisher.clone(), log.clone()));
    let sandboxes = Arc::new(SandboxService::new(Arc::clone(&booter), Arc::clone(&service)));
    let connections = Connections::new();
    let mut server = server(listener, &connections, &service, sandboxes)?;
    server.start().await.context("server")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let asked = tokio::select! {
        () = service.shut_down() => true,
        _ = terminate.recv() => {
            info!(log, "told to end by SIGTERM");
            service.stop().await;
            false
        }
    };
    booter.give_up().await;
    // One that has booted in just this moment.
    service.stop().await;
    let _ = std::fs::remove_file(&socket);
    let _ = tokio::time::timeout(LAST_ANSWERS, publisher.flush()).await;
    if asked {
        let _ = tokio::time::timeout(HANGING_UP, connections.closed()).await;
    }
    let _ = tokio::time::timeout(LAST_ANSWERS, server.shutdown()).await;
    info!(log, "shim ended");
    Ok(())
}

/// The task service under both names, and the sandbox service.
fn server(
    listener: UnixListener,
    connections: &Connections,
    service: &Arc<TaskService>,
    sandboxes: Arc<SandboxService>,
) -> anyhow::Result<Server> {
    let (third, second) = TASK_SERVICES;
    let handle: Arc<dyn Task + Send + Sync> = Arc::new(Handle::new(Arc::clone(service)));
    let mut older = create_task(Arc::clone(&handle));
    let older = older.remove(third).context("the task service has another name")?;
    Ok(Server::new()
        .add_listener(connections.listen(listener).context("listening socket")?)
        .register_service(create_task(handle))
        .register_service([(second.to_owned(), older)].into())
        .register_service(create_sandbox(Arc::new(SandboxHandle::new(sandboxes)))))
}

/// The spec at `path`; an empty one if there is none.
pub fn bundle_spec(path: &Path) -> Result<SandboxSpec, SandboxError> {
    let read = std::fs::read(path).and_then(|text| Ok(serde_json::from_slice(&text)?));
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(SandboxSpec::default()),
        read => read.map_err(|source| SandboxError::Bundle { path: path.to_path_buf(), source }),
    }
}

/// The sandbox that a bundle's spec asks for.
pub fn request(blank: Blank, spec: SandboxSpec) -> Result<SandboxRequest, SandboxError> {
    let mut sysctls = spec.linux.sysctl;
    let membership = Membership::of(&blank.id, &spec.annotations);
    sysctls.retain(|name, _| is_sandbox_sysctl(name, membership));
    let limits = spec.linux.resources.as_ref().map(Limits::of_container).unwrap_or_default();
    let pod_limits = match membership {
        Membership::Sandbox => Limits::of_pod(&spec.annotations),
        _ => Limits::default(),
    };
    let shared_memory = spec.mounts.iter().find_map(SandboxMount::shared_memory);
    let immutable_flags = spec.process.as_ref().is_some_and(SandboxProcess::has_immutable_flags);
    // Docker lays out that file, and knows later than now which name server to name in it.
    let resolver = spec.mounts.iter().any(SandboxMount::is_resolver_file);
    Ok(SandboxRequest {
        root: state::ROOT.into(),
        namespace: blank.namespace,
        id: blank.id,
        hostname: spec.hostname,
        configuration: blank.configuration?,
        annotations: spec.annotations,
        sysctls,
        cgroup: spec.linux.cgroups_path,
        network: network(&spec.linux.namespaces),
        resolver,
        limits,
        pod_limits,
        mounts: blank.mounts,
        shared_memory: shared_memory.unwrap_or(0),
        immutable_flags,
        etc: None,
        oom_score: spec.process.and_then(|process| process.oom_score_adj),
        socket: Some(blank.socket),
    })
}

/// Where others find the sandbox's network: a namespace that is there, or a new one.
fn network(namespaces: &[LinuxNamespace]) -> NetworkNamespace {
    let asked = namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network);
    match asked.map(LinuxNamespace::path) {
        None => NetworkNamespace::Inherited,
        Some(None) => NetworkNamespace::New,
        Some(Some(path)) => NetworkNamespace::At(path.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::api::{
        ConnectRequest, CreateTaskRequest, PauseRequest, ShutdownRequest, StateRequest,
    };
    use containerd_shim_protos::sandbox_api::{
        CreateSandboxRequest, PingRequest, SandboxStatusRequest, ShutdownSandboxRequest,
        StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    };
    use containerd_shim_protos::sandbox_async::SandboxClient;
    use containerd_shim_protos::shim_async::{Client, TaskClient};
    use containerd_shim_protos::ttrpc::context::Context;
    use containerd_shim_protos::ttrpc::{Code, Error, Request};
    use protobuf::Message;

    fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> (Code, String) {
        match result {
            Err(Error::RpcStatus(status)) => (status.code.enum_value().unwrap(), status.message),
            other => panic!("{other:?}"),
        }
    }

    /// A shim that is up, but for its sandbox.
    struct Shim {
        folder: tempfile::TempDir,
        service: Arc<TaskService>,
        booter: Arc<Booter>,
        connections: Connections,
        _server: Server,
        client: Client,
    }

    async fn shim(configuration: Result<Configuration, ConfigurationError>) -> Shim {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let log = Logger::root(slog::Discard, slog::o!());
        let publisher = Publisher::new("/nowhere", "ns", log.clone());
        let blank = Blank {
            namespace: "ns".to_owned(),
            id: "x".to_owned(),
            socket: socket.clone(),
            configuration,
            mounts: HostMounts::default(),
        };
        let announcer = Arc::new(Announcer::new(publisher.clone()));
        let (booter, sandbox) = Booter::new(blank, announcer, log.clone());
        let booter = Arc::new(booter);
        let service = Arc::new(TaskService::new(sandbox, publisher, log));
        let sandboxes = Arc::new(SandboxService::new(Arc::clone(&booter), Arc::clone(&service)));
        let connections = Connections::new();
        let mut server = server(listener, &connections, &service, sandboxes).unwrap();
        server.start().await.unwrap();
        let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
        Shim { folder, service, booter, connections, _server: server, client }
    }

    /// A connection ends for the shim when its client has closed it, not before.
    #[tokio::test]
    async fn the_clients_hang_up_after_the_last_answer() {
        let Shim { service, connections, _server, client, .. } =
            shim(Ok(Configuration::default())).await;
        let (task, other) = (TaskClient::new(client.clone()), client);
        task.shutdown(Context::default(), &ShutdownRequest::default()).await.unwrap();
        service.shut_down().await;
        let still = Duration::from_millis(20);
        tokio::time::timeout(still, connections.closed()).await.unwrap_err();
        drop(task);
        tokio::time::timeout(still, connections.closed()).await.unwrap_err();
        drop(other);
        tokio::time::timeout(HANGING_UP, connections.closed()).await.unwrap();
    }

    /// A shim whose sandbox could not be had.
    #[tokio::test]
    async fn both_versions_are_served_and_the_boots_error_is_creates() {
        let Shim { folder, service, booter, _server, client, .. } =
            shim(Ok(Configuration::default())).await;
        let source = std::io::Error::other("because");
        assert!(booter.begin(|_| Err(SandboxError::Kvm(source))));
        let state = StateRequest { id: "x".to_owned(), ..StateRequest::default() };
        for service in [TASK_SERVICES.0, TASK_SERVICES.1] {
            let request = Request {
                service: service.to_owned(),
                method: "State".to_owned(),
                payload: state.write_to_bytes().unwrap(),
                ..Request::default()
            };
            let (code, text) = code(client.request(request).await);
            assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "container x does not exist"));
        }
        let task = TaskClient::new(client);
        let paused = task.pause(Context::default(), &PauseRequest::default()).await;
        assert_eq!(code(paused).0, Code::NOT_FOUND);
        std::fs::write(
            folder.path().join("config.json"),
            r#"{"ociVersion":"1.1.0","root":{"path":"r"}}"#,
        )
        .unwrap();
        let bundle = folder.path().to_string_lossy().into_owned();
        let create = CreateTaskRequest { id: "x".to_owned(), bundle, ..Default::default() };
        let (code, text) = code(task.create(Context::default(), &create).await);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(text.contains("/dev/kvm") && text.ends_with("because"), "{text}");
        task.shutdown(Context::default(), &ShutdownRequest::default()).await.unwrap();
        service.shut_down().await;
    }

    #[tokio::test]
    async fn a_sandbox_is_created_once_and_ends_with_its_shim() {
        let refused = ConfigurationError::ForbiddenAnnotation {
            name: "io.husk.memory".to_owned(),
            short: "memory".to_owned(),
            origin: "husk.toml".to_owned(),
        };
        let Shim { service, _server, client, .. } = shim(Err(refused)).await;
        let (tasks, sandboxes) = (TaskClient::new(client.clone()), SandboxClient::new(client));
        let sandbox_id = "x".to_owned();
        let wait = WaitSandboxRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
        let waited = sandboxes.wait_sandbox(Context::default(), &wait).await;
        assert_eq!(code(waited).0, Code::NOT_FOUND);
        let mut create = CreateSandboxRequest { sandbox_id: "y".to_owned(), ..Default::default() };
        let created = sandboxes.create_sandbox(Context::default(), &create).await;
        assert_eq!(code(created).0, Code::INVALID_ARGUMENT);
        create.sandbox_id.clone_from(&sandbox_id);
        sandboxes.create_sandbox(Context::default(), &create).await.unwrap();
        let created = sandboxes.create_sandbox(Context::default(), &create).await;
        let exists = (Code::ALREADY_EXISTS, "sandbox x already exists".to_owned());
        assert_eq!(code(created), exists);
        let ping = PingRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
        let pinged = sandboxes.ping_sandbox(Context::default(), &ping).await;
        assert_eq!(code(pinged).0, Code::FAILED_PRECONDITION);
        let start = StartSandboxRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
        let (start_code, text) = code(sandboxes.start_sandbox(Context::default(), &start).await);
        assert_eq!(start_code, Code::INVALID_ARGUMENT);
        assert!(text.contains("io.husk.memory"), "{text}");
        // containerd finds the shim again by its name, though there is no such task.
        let connect = ConnectRequest { id: sandbox_id.clone(), ..Default::default() };
        let connected = tasks.connect(Context::default(), &connect).await.unwrap();
        assert_eq!(connected.shim_pid, std::process::id());
        let unknown = ConnectRequest { id: "unknown".to_owned(), ..Default::default() };
        let connected = tasks.connect(Context::default(), &unknown).await.unwrap();
        assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), 0));
        // The end of a task's is not the sandbox's.
        tasks.shutdown(Context::default(), &ShutdownRequest::default()).await.unwrap();
        let status = SandboxStatusRequest {
            sandbox_id: sandbox_id.clone(),
            verbose: true,
            ..Default::default()
        };
        let seen = sandboxes.sandbox_status(Context::default(), &status).await.unwrap();
        assert_eq!((seen.state.as_str(), seen.pid), ("SANDBOX_NOTREADY", 0));
        assert!(seen.info["info"].contains("shimPid") && seen.created_at.is_some());
        for _ in 0..2 {
            let stop = StopSandboxRequest { sandbox_id: sandbox_id.clone(), ..Default::default() };
            sandboxes.stop_sandbox(Context::default(), &stop).await.unwrap();
        }
        let ended = sandboxes.wait_sandbox(Context::default(), &wait).await.unwrap();
        assert!(ended.exit_status == 0 && ended.exited_at.is_some());
        let shutdown = ShutdownSandboxRequest { sandbox_id, ..Default::default() };
        sandboxes.shutdown_sandbox(Context::default(), &shutdown).await.unwrap();
        service.shut_down().await;
    }

    #[test]
    fn a_bundle_without_a_process_waits_for_a_sandbox() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert!(bundle_spec(&path).unwrap().process.is_none());
        std::fs::write(&path, r#"{"ociVersion":"1.1.0"}"#).unwrap();
        assert!(bundle_spec(&path).unwrap().process.is_none());
        std::fs::write(&path, r#"{"process":{"args":[]}}"#).unwrap();
        assert!(bundle_spec(&path).unwrap().process.is_some());
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(bundle_spec(&path), Err(SandboxError::Bundle { .. })));
    }

    #[test]
    fn the_sandbox_is_made_from_the_spec() {
        let text = r#"{"hostname":"h","annotations":{"a":"b"},"process":{},
            "linux":{"sysctl":{"net.x":"1","kernel.y":"2"},"cgroupsPath":"/c",
            "namespaces":[{"type":"network","path":"/n"}]}}"#;
        let spec: SandboxSpec = serde_json::from_str(text).unwrap();
        assert_eq!(spec.hostname, "h");
        assert_eq!(spec.annotations["a"], "b");
        assert_eq!(spec.linux.sysctl.len(), 2);
        assert_eq!(spec.linux.cgroups_path.as_deref(), Some("/c"));
        assert_eq!(network(&spec.linux.namespaces), NetworkNamespace::At("/n".into()));
        assert_eq!(network(&[]), NetworkNamespace::Inherited);
        assert!(serde_json::from_str::<SandboxSpec>("{}").unwrap().hostname.is_empty());
    }
}
