//! Starts the agent in namespaces of its own and speaks to it as the runtime does.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_agent_protocols::agent::{
    ContainerRequest, CreateContainerRequest, Empty, ExecProcessRequest, ForwardPortRequest,
    HostPort, MemoryVolume, NetworkState, ProcessRequest, SetProcessorsRequest,
    SignalProcessRequest, StartSandboxRequest, StartShellRequest, Streams, UpdateNetworkResponse,
    WaitProcessResponse,
};
use husk_agent_protocols::agent_ttrpc::AgentClient;
use protobuf::MessageField;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

const BUSYBOX: &str = "/bin/busybox";
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the tests cannot run here; says so.
pub fn skip() -> bool {
    let root = fs::read_to_string("/proc/self/status")
        .is_ok_and(|s| s.lines().any(|l| l.starts_with("Uid:\t0\t")));
    let able = root && Path::new(BUSYBOX).exists();
    if !able {
        husk_skip::skipped(format_args!("needs root and {BUSYBOX} (package busybox-static)"));
    }
    !able
}

/// The agent to test: HUSK_AGENT, such as the guest's static one, or the one just built.
fn program() -> OsString {
    std::env::var_os("HUSK_AGENT").unwrap_or_else(|| env!("CARGO_BIN_EXE_husk-agent").into())
}

/// What a process left.
#[derive(Debug)]
pub struct Ran {
    pub output: Vec<u8>,
    pub error: Vec<u8>,
    pub status: u32,
    pub output_bytes: u64,
    pub error_bytes: u64,
    pub out_of_memory: u64,
}

impl Ran {
    pub fn output(&self) -> &str {
        std::str::from_utf8(&self.output).unwrap_or("(not text)")
    }
    pub fn error(&self) -> &str {
        std::str::from_utf8(&self.error).unwrap_or("(not text)")
    }
}

/// A process that was made.
pub struct Held {
    container: String,
    exec: String,
    input: Option<UnixStream>,
    output: JoinHandle<Vec<u8>>,
    error: Option<JoinHandle<Vec<u8>>>,
}

impl Held {
    pub async fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        self.input.as_mut().context("input is open")?.write_all(bytes).await?;
        Ok(())
    }
    pub fn close(&mut self) {
        self.input = None;
    }
}

pub struct Agent {
    directory: TempDir,
    child: Child,
    client: AgentClient,
    ports: Cell<u32>,
    pub descriptors_at_start: usize,
}

/// The sockets of one process's streams.
struct Ports {
    listeners: Vec<UnixListener>,
    streams: Streams,
}

impl Agent {
    /// An agent whose sandbox is started.
    pub async fn start() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("husk-agent").tempdir_in("/tmp")?;
        make_root(&directory.path().join("rootfs"))?;
        let listener = UnixListener::bind(directory.path().join("1024"))?;
        let child = Command::new("unshare")
            .args(["--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child"])
            .arg(program())
            .arg("component")
            .arg(directory.path())
            .spawn()?;
        let (stream, _) = timeout(PATIENCE, listener.accept()).await??;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        let ports = Cell::new(0x1_0000);
        let mut agent = Self { directory, child, client, ports, descriptors_at_start: 0 };
        let mut request = StartSandboxRequest::new();
        request.hostname = "sandbox".to_owned();
        request.sysctls.insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
        agent.client.start_sandbox(context(), &request).await?;
        agent.descriptors_at_start = agent.descriptors()?;
        Ok(agent)
    }

    /// Ends it, which must succeed.
    pub async fn end(mut self) -> Result<()> {
        self.client.shutdown(context(), &Empty::new()).await?;
        for _ in 0..200 {
            if let Some(status) = self.child.try_wait()? {
                assert!(status.success(), "{status}");
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("the agent does not end")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pid(&self) -> Result<String> {
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        Ok(children.split_whitespace().next().context("the agent runs")?.to_owned())
    }

    /// `path` as the agent sees it.
    pub fn guest_path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.pid().unwrap_or_default()).into()
    }

    /// How many descriptors the agent has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()?))?.count())
    }

    fn ports(&self, terminal: bool) -> Result<Ports> {
        let mut streams = Streams::new();
        let mut listeners = Vec::new();
        let mut next = || {
            let port = self.ports.get();
            self.ports.set(port + 1);
            listeners.push(UnixListener::bind(self.path(&port.to_string()))?);
            anyhow::Ok(port)
        };
        streams.stdin = host_port(next()?);
        streams.stdout = host_port(next()?);
        if terminal {
            (streams.rows, streams.columns) = (40, 100);
        } else {
            streams.stderr = host_port(next()?);
        }
        streams.terminal = terminal;
        Ok(Ports { listeners, streams })
    }

    pub async fn create(&self, id: &str, change: impl FnOnce(&mut Value)) -> Result<Held> {
        self.create_with(id, self.ports(false)?, change).await
    }

    pub async fn create_on_terminal(
        &self,
        id: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Held> {
        self.create_with(id, self.ports(true)?, change).await
    }

    async fn create_with(
        &self,
        id: &str,
        ports: Ports,
        change: impl FnOnce(&mut Value),
    ) -> Result<Held> {
        let mut spec = spec(&self.path("rootfs"));
        spec["process"]["terminal"] = json!(ports.streams.terminal);
        change(&mut spec);
        let mut request = CreateContainerRequest::new();
        request.container_id = id.to_owned();
        request.spec = serde_json::to_vec(&spec)?;
        request.streams = Some(ports.streams.clone()).into();
        self.client.create_container(context(), &request).await?;
        take(ports, id, "").await
    }

    pub async fn begin_exec(
        &self,
        id: &str,
        exec: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<Held> {
        let (ports, request) = self.exec_request(id, exec, change)?;
        self.client.exec_process(context(), &request).await?;
        take(ports, id, exec).await
    }

    fn exec_request(
        &self,
        id: &str,
        exec: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<(Ports, ExecProcessRequest)> {
        let ports = self.ports(false)?;
        let mut process = spec(Path::new("/"))["process"].take();
        change(&mut process);
        let mut request = ExecProcessRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec.to_owned();
        request.process = serde_json::to_vec(&process)?;
        request.streams = Some(ports.streams.clone()).into();
        Ok((ports, request))
    }

    /// Asks for `sleep 7777` as a process of `id`, and gives the call up after `limit`; whether it was
    /// answered before.
    pub async fn give_up_exec(&self, id: &str, exec: &str, limit: Duration) -> Result<bool> {
        let (_ports, request) =
            self.exec_request(id, exec, |p| p["args"] = json!(["sleep", "7777"]))?;
        let context = ttrpc::context::with_duration(limit);
        Ok(self.client.exec_process(context, &request).await.is_ok())
    }

    pub async fn exec(&self, id: &str, exec: &str, change: impl FnOnce(&mut Value)) -> Result<Ran> {
        let held = self.begin_exec(id, exec, change).await?;
        self.finish(held).await
    }

    /// Starts busybox in no container, from `program`.
    pub async fn begin_shell(
        &self,
        id: &str,
        program: &[u8],
        line: &str,
        terminal: bool,
    ) -> Result<Held> {
        let (ports, mut own) = (self.ports(terminal)?, self.ports(false)?);
        let mut request = StartShellRequest::new();
        request.shell_id = id.to_owned();
        request.program = own.streams.stdin.clone();
        request.arguments = ["sh", "-c", line].map(str::to_owned).to_vec();
        request.environment = vec!["PATH=/bin".to_owned()];
        request.streams = Some(ports.streams.clone()).into();
        let (program, listener) = (program.to_vec(), own.listeners.remove(0));
        let feeder = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            stream.write_all(&program).await
        });
        self.client.start_shell(context(), &request).await?;
        feeder.await??;
        take(ports, "", id).await
    }

    /// Runs a container from its creation to its deletion.
    pub async fn run(&self, change: impl FnOnce(&mut Value)) -> Result<Ran> {
        let id = format!("run-{}", self.ports.get());
        let held = self.create(&id, change).await?;
        self.start_container(&id).await?;
        self.finish(held).await
    }

    /// Waits for the process, takes what it wrote, and deletes it.
    pub async fn finish(&self, held: Held) -> Result<Ran> {
        let exited = self.wait(&held.container, &held.exec).await?;
        let output = timeout(PATIENCE, held.output).await??;
        let error = match held.error {
            Some(error) => timeout(PATIENCE, error).await??,
            None => Vec::new(),
        };
        match held.exec.as_str() {
            "" => self.delete(&held.container).await?,
            // A shell has no container.
            exec => self.delete_exec(&held.container, exec).await?,
        }
        Ok(Ran {
            output,
            error,
            status: exited.exit_status,
            output_bytes: exited.stdout_bytes,
            error_bytes: exited.stderr_bytes,
            out_of_memory: exited.oom_kills,
        })
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        self.client.start_container(context(), &container(id)).await?;
        Ok(())
    }

    pub async fn delete(&self, id: &str) -> Result<()> {
        self.client.delete_container(context(), &container(id)).await?;
        Ok(())
    }

    pub async fn delete_exec(&self, id: &str, exec: &str) -> Result<()> {
        self.client.delete_process(context(), &process(id, exec)).await?;
        Ok(())
    }

    pub async fn close_input(&self, id: &str, exec: &str) -> Result<()> {
        self.client.close_stdin(context(), &process(id, exec)).await?;
        Ok(())
    }

    pub async fn wait(&self, id: &str, exec: &str) -> Result<WaitProcessResponse> {
        Ok(self.client.wait_process(context(), &process(id, exec)).await?)
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let mut request = SignalProcessRequest::new();
        (request.container_id, request.exec_id) = (id.to_owned(), exec.to_owned());
        (request.signal, request.all) = (signal, all);
        self.client.signal_process(context(), &request).await?;
        Ok(())
    }

    pub async fn set_processors(&self, count: u32) -> Result<u32> {
        let request = SetProcessorsRequest { count, ..Default::default() };
        Ok(self.client.set_processors(context(), &request).await?.before)
    }

    pub async fn make_memory_volume(&self, volume: &MemoryVolume) -> Result<()> {
        self.client.make_memory_volume(context(), volume).await?;
        Ok(())
    }

    /// A connection to a port of the agent's loopback device.
    pub async fn forward_port(&self, port: u32) -> Result<UnixStream> {
        let number = self.ports.get();
        self.ports.set(number + 1);
        let listener = UnixListener::bind(self.path(&number.to_string()))?;
        let host = host_port(number);
        let request = ForwardPortRequest { port, host, ..Default::default() };
        self.client.forward_port(context(), &request).await?;
        Ok(timeout(PATIENCE, listener.accept()).await??.0)
    }

    pub async fn update_network(&self, state: &NetworkState) -> Result<UpdateNetworkResponse> {
        Ok(self.client.update_network(context(), state).await?)
    }

    /// The network namespace that the agent is in.
    pub fn network(&self) -> Result<PathBuf> {
        Ok(format!("/proc/{}/ns/net", self.pid()?).into())
    }

    pub async fn look_for_devices(&self) -> Result<()> {
        self.client.look_for_devices(context(), &Empty::new()).await?;
        Ok(())
    }

    pub async fn list(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let listed = self.client.list_processes(context(), &container(id)).await?;
        Ok(listed.processes.into_iter().map(|p| (p.pid, p.exec_id)).collect())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // PID 1 dies with its parent, and everything in its namespaces with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // After a failure its cgroups are left.
        let name = self.directory.path().file_name().unwrap_or_default();
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            remove_cgroup(&Path::new(root).join(name));
        }
    }
}

fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        remove_cgroup(&entry.path());
    }
    let _ = fs::remove_dir(path);
}

fn host_port(port: u32) -> MessageField<HostPort> {
    Some(HostPort { port, ..Default::default() }).into()
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(PATIENCE)
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..Default::default() }
}

fn process(id: &str, exec: &str) -> ProcessRequest {
    let (container_id, exec_id) = (id.to_owned(), exec.to_owned());
    ProcessRequest { container_id, exec_id, ..Default::default() }
}

async fn take(ports: Ports, container: &str, exec: &str) -> Result<Held> {
    let mut accepted = Vec::new();
    for listener in &ports.listeners {
        accepted.push(timeout(PATIENCE, listener.accept()).await??.0);
    }
    let mut accepted = accepted.into_iter();
    let input = accepted.next();
    let mut reader = || {
        accepted.next().map(|mut stream| {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all).await;
                all
            })
        })
    };
    let output = reader().context("output has a port")?;
    let error = reader();
    let (container, exec) = (container.to_owned(), exec.to_owned());
    Ok(Held { container, exec, input, output, error })
}

/// The code and text of a refused call.
pub fn refusal<T>(result: Result<T>) -> (Code, String) {
    let Err(error) = result else { return (Code::OK, String::new()) };
    match error.downcast_ref::<ttrpc::Error>() {
        Some(ttrpc::Error::RpcStatus(status)) => {
            (status.code.enum_value_or_default(), status.message.clone())
        }
        _ => (Code::INTERNAL, format!("{error:#}")),
    }
}

fn make_root(root: &Path) -> Result<()> {
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    fs::write(root.join("one"), "")?;
    let listed = Command::new(BUSYBOX).arg("--list").output()?;
    for name in String::from_utf8(listed.stdout)?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name))?;
    }
    Ok(())
}

/// A spec as containerd makes them, with few capabilities so that the numbers are short.
fn spec(root: &Path) -> Value {
    let capabilities = json!(["CAP_CHOWN", "CAP_KILL"]);
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": root},
        "hostname": "box",
        "process": {
            "args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"], "noNewPrivileges": true,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "rw"]},
        ],
        "linux": {
            "cgroupsPath": "/default/elsewhere",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
            },
        },
    })
}
