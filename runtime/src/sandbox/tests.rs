//! A sandbox over a machine and an agent that are played by the test.

mod hostile;
mod silent;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_agent_protocols::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, ExecProcessRequest,
    ExecProcessResponse, ListProcessesResponse, ProcessRequest, ResizeTerminalRequest,
    SetProcessorsRequest, SetProcessorsResponse, SignalProcessRequest, StartShellRequest,
    StartShellResponse, Streams, UpdateContainerRequest, WaitProcessResponse,
};
use husk_agent_protocols::agent_ttrpc::{Agent, create_agent};
use husk_configuration::Configuration;
use husk_control::{EndReason, Event, MachineMessage, MachineRequest, MemorySize, Reply, Request};
use nix::sys::stat::Mode;
use serde_json::json;
use slog::Logger;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::agent_client::AgentClient;
use crate::apart::tests::with_own_mounts;
use crate::container::{
    Container, ContainerError, CreateRequest, ExecRequest, Exit, Follower, Happening, HostMounts,
    Observer, SizePlan, Status,
};
use crate::io::StdioPaths;
use crate::lock::lock;
use crate::machine::Machine;
use crate::resource::{Limits, Share, SizingRules, Sources, Volumes};

/// Answers every request, and tells what the test wants told.
pub(crate) struct FakeMachine {
    control: OwnedFd,
    /// What became of its processors: true for each time they were told to stand still.
    paused: Mutex<Vec<bool>>,
    /// What machine and agent were told about the machine's size, in order.
    notes: Mutex<Vec<String>>,
    size: Mutex<MemorySize>,
    /// The guest does not take up more than that.
    takes_mib: u64,
    /// Ends of the streams that the guest may connect to.
    streams: Mutex<HashMap<u32, OwnedFd>>,
    /// Answers no request any more.
    silent: AtomicBool,
}

impl FakeMachine {
    fn tell(&self, message: &MachineMessage) {
        husk_control::send(&self.control, message, &[]).unwrap();
    }

    fn note(&self, note: String) {
        lock(&self.notes).push(note);
    }

    fn resize(&self, mib: u64) -> MemorySize {
        self.note(format!("memory {mib}"));
        let mut size = lock(&self.size);
        let added = mib > 256 && size.requested_mib == 0;
        *size = MemorySize { requested_mib: mib, present_mib: mib.min(self.takes_mib), added };
        *size
    }

    /// As if the guest connected to `port`; the guest's end.
    fn connect(&self, port: u32) -> UnixStream {
        // One that nobody listens for leads nowhere.
        let given = lock(&self.streams).remove(&port);
        let guest = given.map_or_else(|| StdStream::pair().unwrap().0, StdStream::from);
        self.tell(&MachineMessage::Event(Event::Connection { port }));
        guest.set_nonblocking(true).unwrap();
        UnixStream::from_std(guest).unwrap()
    }

    fn serve(self: Arc<Self>) {
        while let Ok(Some(mut packet)) = husk_control::receive::<Request>(&self.control) {
            let Request { id, request } = packet.message.clone();
            if self.silent.load(Ordering::Relaxed) {
                continue;
            }
            match request {
                MachineRequest::Boot(_) => panic!("booted"),
                MachineRequest::Accept { port, from: _, stream } => {
                    lock(&self.streams).insert(port, packet.take(stream).unwrap());
                }
                MachineRequest::Pause => lock(&self.paused).push(true),
                MachineRequest::Resume => lock(&self.paused).push(false),
                MachineRequest::EnsureVcpus { count } => self.note(format!("vcpus {count}")),
                MachineRequest::ResizeMemory { mib } => {
                    let size = self.resize(mib);
                    self.tell(&MachineMessage::Reply { id, result: Ok(Reply::Memory(size)) });
                    continue;
                }
                MachineRequest::AwaitMemory => {
                    self.note("await".to_owned());
                    let size = *lock(&self.size);
                    let result = match size.present_mib == size.requested_mib {
                        true => Ok(Reply::Memory(size)),
                        false => Err("the guest takes nothing".to_owned()),
                    };
                    self.tell(&MachineMessage::Reply { id, result });
                    continue;
                }
                _ => {}
            }
            self.tell(&MachineMessage::Reply { id, result: Ok(Reply::Done) });
        }
    }
}

/// How the agent answers one kind of call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Answer {
    #[default]
    Well,
    Never,
    Refused,
}

impl Answer {
    async fn given(self) -> ttrpc::Result<()> {
        match self {
            Self::Well => Ok(()),
            Self::Never => std::future::pending().await,
            Self::Refused => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::FAILED_PRECONDITION,
                "the guest will not",
            ))),
        }
    }
}

/// The ways in which a guest is hostile.
#[derive(Debug, Clone, Copy, Default)]
struct Mood {
    kill: Answer,
    delete: Answer,
    /// Signals end no process.
    immortal: bool,
    exited_at_nanoseconds: i64,
}

/// One container at a time; its init writes when it is started and exits when it is signalled.
struct FakeAgent {
    machine: Arc<FakeMachine>,
    streams: Mutex<Option<Streams>>,
    output: Mutex<HashMap<u32, UnixStream>>,
    written: Mutex<u64>,
    status: watch::Sender<Option<u32>>,
    deleted: Arc<tokio::sync::Notify>,
    execs: Arc<HeldExecs>,
    mood: Arc<Mutex<Mood>>,
}

impl FakeAgent {
    fn mood(&self) -> Mood {
        *lock(&self.mood)
    }
}

/// Execs that run, before the agent has answered that they do.
#[derive(Default)]
struct HeldExecs {
    /// Notified when the process runs.
    running: tokio::sync::Notify,
    /// To be notified for the answer.
    answer: tokio::sync::Notify,
    /// The guest's end of the process's standard input.
    input: Mutex<Option<UnixStream>>,
}

#[async_trait]
impl Agent for FakeAgent {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let port = request.streams.stdout.port;
        lock(&self.output).insert(port, self.machine.connect(port));
        *lock(&self.streams) = request.streams.into_option();
        Ok(CreateContainerResponse { pid: 5, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let input = self.machine.connect(request.streams.stdin.port);
        *lock(&self.execs.input) = Some(input);
        self.execs.running.notify_one();
        self.execs.answer.notified().await;
        Ok(ExecProcessResponse { pid: 6, ..Default::default() })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let (rows, columns) = (request.rows, request.columns);
        self.machine.note(format!("terminal {rows} {columns} {}", request.exec_id));
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        if !request.exec_id.is_empty() {
            self.machine.note(format!("signal {} {}", request.signal, request.exec_id));
            return Ok(Empty::new());
        }
        self.mood().kill.given().await?;
        if self.mood().immortal {
            return Ok(Empty::new());
        }
        // More than the FIFO and the socket hold: most is still on its way when the exit is told.
        let data = vec![b'x'; 1 << 20];
        let stream = lock(&self.output).drain().next().unwrap().1;
        *lock(&self.written) += data.len() as u64;
        tokio::spawn(async move {
            let mut stream = stream;
            tokio::io::AsyncWriteExt::write_all(&mut stream, &data).await.unwrap();
        });
        self.status.send_replace(Some(128 + request.signal));
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: ProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let mut status = self.status.subscribe();
        let status = status.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(WaitProcessResponse {
            exit_status: status,
            stdout_bytes: *lock(&self.written),
            oom_kills: 1,
            exited_at_nanoseconds: self.mood().exited_at_nanoseconds,
            ..Default::default()
        })
    }

    async fn set_processors(
        &self,
        _: &TtrpcContext,
        request: SetProcessorsRequest,
    ) -> ttrpc::Result<SetProcessorsResponse> {
        self.machine.note(format!("processors {}", request.count));
        Ok(SetProcessorsResponse::new())
    }

    async fn look_for_devices(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.machine.note("look".to_owned());
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.machine.note("limits".to_owned());
        match String::from_utf8_lossy(&request.resources).contains("\"shares\":1,") {
            true => Err(ttrpc::Error::Others("no".to_owned())),
            false => Ok(Empty::new()),
        }
    }

    /// A shell that takes a program and writes what it reads.
    async fn start_shell(
        &self,
        _: &TtrpcContext,
        request: StartShellRequest,
    ) -> ttrpc::Result<StartShellResponse> {
        let mut text = String::new();
        let mut program = self.machine.connect(request.program.port);
        program.read_to_string(&mut text).await.unwrap();
        if text != "program" {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNKNOWN, text)));
        }
        let mut input = self.machine.connect(request.streams.stdin.port);
        let mut output = self.machine.connect(request.streams.stdout.port);
        assert!(request.streams.terminal && request.streams.stderr.is_none());
        let (status, words) = (self.status.clone(), request.arguments.len());
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut input, &mut output).await;
            status.send_replace(u32::try_from(words).ok());
        });
        Ok(StartShellResponse { pid: 9, ..Default::default() })
    }

    async fn delete_process(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<Empty> {
        self.deleted.notify_one();
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        Ok(ListProcessesResponse::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        _: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.mood().delete.given().await?;
        Ok(Empty::new())
    }
}

#[derive(Default)]
pub(crate) struct Heard(Mutex<Vec<(String, Happening)>>);

impl Observer for Heard {
    fn happened(&self, container_id: &str, exec_id: &str, pid: u32, happening: Happening) {
        assert_eq!(pid, 77);
        if !exec_id.is_empty() {
            return;
        }
        lock(&self.0).push((container_id.to_owned(), happening));
    }
}

pub(crate) struct Stage {
    machine: Arc<FakeMachine>,
    heard: Arc<Heard>,
    pub(crate) follower: Follower,
    share: Arc<Share>,
    volumes: Arc<Volumes>,
    /// Told when a process has been forgotten.
    pub(crate) deleted: Arc<tokio::sync::Notify>,
    execs: Arc<HeldExecs>,
    mood: Arc<Mutex<Mood>>,
    server: Server,
    // Last: the share is mounted in it.
    pub(crate) folder: husk_stage::Stage,
}

/// A machine of the default size that can grow to four processors and 4 GiB.
fn plan() -> SizePlan {
    let mut configuration = Configuration::default();
    configuration.machine.max_vcpus = 4;
    configuration.machine.max_memory = husk_configuration::Size::from_mib(4096);
    let rules = SizingRules::new(&configuration, Limits::default());
    SizePlan { booted: rules.size([]), rules }
}

pub(crate) async fn stage() -> Stage {
    let folder = husk_stage::Stage::new().unwrap();
    let log = Logger::root(slog::Discard, slog::o!());
    let (ours, theirs) = husk_control::socket_pair().unwrap();
    let fake = Arc::new(FakeMachine {
        control: theirs,
        paused: Mutex::default(),
        notes: Mutex::default(),
        size: Mutex::default(),
        takes_mib: 3000,
        streams: Mutex::default(),
        silent: AtomicBool::new(false),
    });
    std::thread::spawn({
        let fake = Arc::clone(&fake);
        move || fake.serve()
    });
    let machine = Machine::over(
        ours,
        77,
        async |kill: Arc<tokio::sync::Notify>| {
            kill.notified().await;
            "killed".to_owned()
        },
        &log,
    )
    .unwrap();
    let deleted = Arc::<tokio::sync::Notify>::default();
    let execs = Arc::<HeldExecs>::default();
    let mood = Arc::<Mutex<Mood>>::default();
    let agent = FakeAgent {
        mood: Arc::clone(&mood),
        machine: Arc::clone(&fake),
        streams: Mutex::default(),
        output: Mutex::default(),
        written: Mutex::default(),
        status: watch::Sender::new(None),
        deleted: Arc::clone(&deleted),
        execs: Arc::clone(&execs),
    };
    let (host, guest) = UnixStream::pair().unwrap();
    let once = futures::stream::once(async move { Ok(guest) });
    let once = futures::StreamExt::chain(once, futures::stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(once))
        .register_service(create_agent(Arc::new(agent)));
    server.start().await.unwrap();
    let heard = Arc::new(Heard::default());
    let follower = Follower::new(
        ("ns", "c"),
        Arc::new(machine),
        AgentClient::new(host),
        Arc::clone(&heard) as Arc<dyn Observer>,
        HostMounts::default(),
        plan(),
        log,
    );
    std::fs::create_dir_all(folder.path().join("bundle/rootfs/etc")).unwrap();
    std::fs::write(folder.path().join("volume"), "text").unwrap();
    nix::unistd::mkfifo(&folder.path().join("out"), Mode::S_IRWXU).unwrap();
    let share = Share::create(folder.path().join("share"), Sources::default()).unwrap();
    let volumes = Arc::new(Volumes::create(&share).unwrap());
    Stage { machine: fake, heard, follower, share, volumes, deleted, execs, mood, server, folder }
}

impl Stage {
    fn share(&self) -> std::path::PathBuf {
        self.folder.path().join("share")
    }

    fn assert_nothing_shared(&self) {
        let count = |path: &Path| std::fs::read_dir(path).unwrap().count();
        assert_eq!((count(&self.share()), count(&self.share().join(".volumes"))), (1, 0));
    }

    /// A file of the host's that containers have.
    fn volume(&self) -> std::path::PathBuf {
        self.folder.path().join("volume")
    }

    async fn create(&self) -> Container {
        self.create_as("c").await
    }

    async fn create_as(&self, id: &str) -> Container {
        self.try_create(id, &self.volume()).await.unwrap()
    }

    async fn try_create(&self, id: &str, volume: &Path) -> Result<Container, ContainerError> {
        let spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"},
            "mounts": [{"destination": "/b", "type": "bind", "source": volume,
                        "options": ["rbind", "ro"]}],
        });
        let request = CreateRequest {
            id: id.to_owned(),
            bundle: self.folder.path().join("bundle"),
            spec: serde_json::from_value(spec).unwrap(),
            rootfs: Vec::new(),
            stdio: StdioPaths {
                stdout: self.folder.path().join("out").to_string_lossy().into_owned(),
                ..StdioPaths::default()
            },
        };
        let (share, volumes) = (Arc::clone(&self.share), Arc::clone(&self.volumes));
        Container::create(request, share, volumes, self.follower.clone()).await
    }
}

/// In a thread with a mount namespace of its own; not at all where that is forbidden.
pub(crate) fn apart<T: Future<Output = ()>>(test: impl FnOnce() -> T + Send + 'static) {
    with_own_mounts(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
}

#[test]
fn the_exit_comes_after_the_start_and_the_last_byte_and_leaves_nothing() {
    apart(|| async {
        let stage = stage().await;
        let container = stage.create().await;
        let share = stage.share();
        assert!(share.join("c/rootfs/etc").is_dir());
        let only =
            |folder: &Path| std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
        let written = std::fs::write(only(&only(&share.join(".volumes"))), "x").unwrap_err();
        assert_eq!(written.raw_os_error(), Some(libc::EROFS));
        assert_eq!(container.init().status(), Status::Created);
        container.start().await.unwrap();
        assert_eq!(container.init().status(), Status::Running);
        assert!(container.delete().await.is_err(), "it runs");
        let mut reader =
            pipe::OpenOptions::new().open_receiver(stage.folder.path().join("out")).unwrap();
        container.init().signal(15, false).await.unwrap();
        let mut data = Vec::new();
        let (exit, _) = tokio::join!(container.init().exited(), reader.read_to_end(&mut data));
        assert_eq!(data.len(), 1 << 20);
        assert_eq!(exit.status, 143);
        assert_eq!(
            container.init().signal(9, false).await.unwrap_err().to_string(),
            "process already finished"
        );
        let expected = [Happening::Started, Happening::OutOfMemory, Happening::Exited(exit)];
        assert_eq!(*lock(&stage.heard.0), expected.map(|happening| ("c".to_owned(), happening)));
        container.delete().await.unwrap();
        stage.assert_nothing_shared();
        assert!(stage.volume().exists());
    });
}

#[test]
fn clients_can_be_faster_than_the_answer_to_the_start_of_an_exec() {
    apart(|| async {
        let stage = stage().await;
        let container = Arc::new(stage.create().await);
        container.start().await.unwrap();
        let fifo = stage.folder.path().join("in");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let stdin = fifo.to_string_lossy().into_owned();
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"});
        let stdio = StdioPaths { stdin, terminal: true, ..StdioPaths::default() };
        let spec = serde_json::from_value(process).unwrap();
        container.add_exec(ExecRequest { exec_id: "e".to_owned(), spec, stdio }).unwrap();
        let own = Arc::clone(&container);
        let starting = tokio::spawn(async move { own.start_exec("e").await });
        stage.execs.running.notified().await;
        container.close_input("e").unwrap();
        container.resize("e", 24, 80).await.unwrap();
        let own = Arc::clone(&container);
        let signalling = tokio::spawn(async move { own.signal("e", 15, false).await });
        tokio::task::yield_now().await;
        stage.execs.answer.notify_one();
        starting.await.unwrap().unwrap();
        signalling.await.unwrap().unwrap();
        let mut input = lock(&stage.execs.input).take().unwrap();
        let end = tokio::time::timeout(Duration::from_secs(10), input.read(&mut [0])).await;
        assert_eq!(end.expect("the input has not ended").unwrap(), 0);
        let notes = lock(&stage.machine.notes).clone();
        assert!(notes.contains(&"terminal 24 80 e".to_owned()), "{notes:?}");
        assert!(notes.contains(&"signal 15 e".to_owned()), "{notes:?}");
    });
}

#[test]
fn processors_stand_still_while_every_container_is_paused() {
    apart(|| async {
        let stage = stage().await;
        let container = stage.create().await;
        assert!(container.pause().await.is_err(), "it has not been started");
        container.start().await.unwrap();
        assert!(container.resume().await.is_err(), "it is not paused");
        let told = || std::mem::take(&mut *lock(&stage.machine.paused));
        container.pause().await.unwrap();
        assert_eq!(container.status(container.init()), Status::Paused);
        assert_eq!(told(), [true]);
        assert!(container.pause().await.is_err(), "it is paused");
        // They run for as long as it takes to answer.
        container.processes().await.unwrap();
        assert_eq!(told(), [false, true]);
        container.resume().await.unwrap();
        assert_eq!(told(), [false]);
        container.processes().await.unwrap();
        assert!(told().is_empty());
        // A signal is for the processes: from then on they run.
        container.pause().await.unwrap();
        container.init().signal(9, false).await.unwrap();
        assert_eq!(told(), [true, false]);
    });
}

#[test]
fn the_machine_grows_before_a_limit_rises_and_shrinks_after_it_falls() {
    apart(|| async {
        let stage = stage().await;
        let container = stage.create().await;
        let notes = || std::mem::take(&mut *lock(&stage.machine.notes));
        assert!(notes().is_empty(), "it needs no more than there is");
        let update = async |resources: serde_json::Value| {
            container.update(serde_json::from_value(resources).unwrap()).await
        };
        let gib = |count: i64| json!({"limit": count << 30});
        update(json!({"cpu": {"quota": 150_000}, "memory": gib(1)})).await.unwrap();
        let grown = ["vcpus 2", "processors 2", "memory 1088", "look", "await", "limits"];
        assert_eq!(notes(), grown);
        update(json!({"memory": gib(2)})).await.unwrap();
        assert_eq!(notes(), ["memory 2112", "await", "limits"], "the device is there");
        update(json!({"pids": {"limit": 5}})).await.unwrap();
        assert_eq!(notes(), ["limits"]);
        // A refused change leaves the machine as it was.
        update(json!({"cpu": {"quota": 400_000, "shares": 1, "period": 100_000}}))
            .await
            .unwrap_err();
        assert_eq!(notes(), ["vcpus 4", "processors 4", "limits", "processors 2"]);
        // The guest takes up less than it is given: the limit is not set.
        let error = update(json!({"memory": gib(3)})).await.unwrap_err();
        assert!(matches!(error, ContainerError::Resize(_)), "{error}");
        assert_eq!(notes(), ["memory 3136", "await", "memory 2112"]);
        // More than there is room for: as far as it goes.
        update(json!({"cpu": {"quota": 900_000}, "memory": {"limit": 1}})).await.unwrap();
        let changed = ["vcpus 4", "processors 4", "limits", "memory 256"];
        assert_eq!(notes()[..4], changed);
        let size = &stage.follower.size;
        let limits =
            Limits::of_container(&serde_json::from_value(json!({"memory": gib(1)})).unwrap());
        let failed = async { Err::<(), _>(ContainerError::NoContainer("x".to_owned())) };
        size.with_container("x", limits, failed).await.unwrap_err();
        let both: Vec<_> = notes().into_iter().filter(|note| note.starts_with('m')).collect();
        assert_eq!(both, ["memory 1089", "memory 256"], "it comes and goes");
        size.with_container("y", limits, async { Ok(()) }).await.unwrap();
        size.remove_container("c").await;
        size.remove_container("y").await;
        let last: Vec<_> = notes().into_iter().filter(|note| note != "await").collect();
        assert_eq!(last, ["memory 1089", "processors 1", "memory 1088"], "the last one leaves it");
    });
}

#[test]
fn a_guest_that_breaks_its_agents_connection_loses_its_machine() {
    apart(|| async {
        let mut stage = stage().await;
        let container = stage.create().await;
        container.start().await.unwrap();
        stage.server.disconnect().await;
        let exit = tokio::time::timeout(Duration::from_secs(10), container.init().exited());
        let Ok(Exit { status, .. }) = exit.await else { panic!("no exit") };
        assert_eq!(status, 255);
        let end = stage.follower.machine.ended().expect("it was given up");
        assert!(!end.expected && end.reason.contains("connection to the agent broke"), "{end:?}");
        container.delete().await.unwrap();
        stage.assert_nothing_shared();
    });
}

#[test]
fn a_machine_that_ends_takes_its_processes_along() {
    apart(|| async {
        let stage = stage().await;
        let container = stage.create().await;
        container.start().await.unwrap();
        let reason = EndReason::Panicked;
        stage.machine.tell(&MachineMessage::Event(Event::Ended { reason }));
        nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&stage.machine.control),
            nix::sys::socket::Shutdown::Both,
        )
        .unwrap();
        // The process does not go by itself here: the machine's end is told once it is killed.
        let exit = tokio::time::timeout(Duration::from_secs(10), container.init().exited());
        let Ok(Exit { status, .. }) = exit.await else { panic!("no exit") };
        assert_eq!(status, 255);
        container.delete().await.unwrap();
        stage.assert_nothing_shared();
    });
}
