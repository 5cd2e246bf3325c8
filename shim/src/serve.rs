//! The shim itself: boots the sandbox and serves containerd's requests until it is shut down.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use containerd_shim::Flags;
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use husk_configuration::{Configuration, ConfigurationError};
use husk_runtime::container::HostMounts;
use husk_runtime::machine::NetworkNamespace;
use husk_runtime::resource::Limits;
use husk_runtime::sandbox::{Sandbox, SandboxError, SandboxRequest};
use husk_runtime::spec::{Membership, is_sandbox_sysctl};
use husk_runtime::state;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources};
use serde::Deserialize;
use slog::{Level, Logger, error, info};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::address::socket_path;
use crate::publisher::Publisher;
use crate::service::{Announcer, Handle, TaskService};
use crate::{daemon, error, log};

/// The service's name in version 3 of the task API, and in version 2: the messages are the same.
const TASK_SERVICES: (&str, &str) = ("containerd.task.v3.Task", "containerd.task.v2.Task");

/// How long answers on their way out are waited for at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// What came of booting the sandbox; none while it boots.
pub type Booted = Option<Result<Arc<Sandbox>, Arc<SandboxError>>>;

/// As much of the bundle's spec as the sandbox is made from.
#[derive(Debug, Default, Deserialize)]
struct SandboxSpec {
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    linux: SandboxLinux,
    #[serde(default)]
    mounts: Vec<SandboxMount>,
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
    let (listener, mounts) = daemon::settle()?;
    let mounts = HostMounts(Some(Arc::new(mounts)));
    let configuration = Configuration::load(None);
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
    let (booted, sandbox) = watch::channel(None);
    let booting = tokio::spawn(boot(
        request(flags, configuration, mounts),
        Arc::new(Announcer::new(publisher.clone())),
        booted,
        log.clone(),
    ));
    let service = Arc::new(TaskService::new(sandbox, publisher.clone(), log.clone()));
    let mut server = server(listener, &service)?;
    server.start().await.context("server")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    tokio::select! {
        () = service.shut_down() => {}
        _ = terminate.recv() => {
            info!(log, "told to end by SIGTERM");
            service.stop().await;
        }
    }
    // A sandbox that still boots is nobody's any more; dropping it ends its processes.
    booting.abort();
    let _ = booting.await;
    let _ = std::fs::remove_file(&socket);
    let _ = tokio::time::timeout(LAST_ANSWERS, publisher.flush()).await;
    let _ = tokio::time::timeout(LAST_ANSWERS, server.shutdown()).await;
    info!(log, "shim ended");
    Ok(())
}

/// One service under both names.
fn server(listener: UnixListener, service: &Arc<TaskService>) -> anyhow::Result<Server> {
    let (third, second) = TASK_SERVICES;
    let handle: Arc<dyn Task + Send + Sync> = Arc::new(Handle::new(Arc::clone(service)));
    let mut older = create_task(Arc::clone(&handle));
    let older = older.remove(third).context("the task service has another name")?;
    Ok(Server::new()
        .add_listener(Listener::try_from(listener).context("listening socket")?)
        .register_service(create_task(handle))
        .register_service([(second.to_owned(), older)].into()))
}

/// The sandbox for the bundle in the working folder.
fn request(
    flags: &Flags,
    configuration: Result<Configuration, ConfigurationError>,
    mounts: HostMounts,
) -> Result<SandboxRequest, SandboxError> {
    let path = Path::new("config.json");
    let spec: SandboxSpec = std::fs::read(path)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(|source| SandboxError::Bundle { path: path.to_path_buf(), source })?;
    let mut sysctls = spec.linux.sysctl;
    let membership = Membership::of(&flags.id, &spec.annotations);
    sysctls.retain(|name, _| is_sandbox_sysctl(name, membership));
    let limits = match membership {
        Membership::Sandbox => Limits::of_pod(&spec.annotations),
        _ => spec.linux.resources.as_ref().map(Limits::of_container).unwrap_or_default(),
    };
    let shared_memory = spec.mounts.iter().find_map(SandboxMount::shared_memory);
    Ok(SandboxRequest {
        root: state::ROOT.into(),
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        hostname: spec.hostname,
        configuration: configuration?,
        annotations: spec.annotations,
        sysctls,
        cgroup: spec.linux.cgroups_path,
        network: network(&spec.linux.namespaces),
        limits,
        mounts,
        shared_memory: shared_memory.unwrap_or(0),
        socket: Some(socket_path(&flags.socket)),
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

async fn boot(
    request: Result<SandboxRequest, SandboxError>,
    announcer: Arc<Announcer>,
    booted: watch::Sender<Booted>,
    log: Logger,
) {
    let result = match request {
        Ok(request) => Sandbox::create(request, announcer, &log).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &result {
        error!(log, "no sandbox: {}", error::chain(error));
    }
    booted.send_replace(Some(result.map_err(Arc::new)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::api::{
        CreateTaskRequest, PauseRequest, ShutdownRequest, StateRequest,
    };
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

    /// A shim whose sandbox could not be had.
    #[tokio::test]
    async fn both_versions_are_served_and_the_boots_error_is_creates() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let log = Logger::root(slog::Discard, slog::o!());
        let publisher = Publisher::new("/nowhere", "ns", log.clone());
        let source = std::io::Error::other("because");
        let (_booted, sandbox) = watch::channel(Some(Err(Arc::new(SandboxError::Kvm(source)))));
        let service = Arc::new(TaskService::new(sandbox, publisher, log));
        let mut server = server(listener, &service).unwrap();
        server.start().await.unwrap();

        let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
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
