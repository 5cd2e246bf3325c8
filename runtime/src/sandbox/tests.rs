//! A sandbox over a machine and an agent that are played by the test.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use husk_agent_protocols::agent::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty,
    ListProcessesResponse, ProcessRequest, SignalProcessRequest, Streams, WaitProcessResponse,
};
use husk_agent_protocols::agent_ttrpc::{Agent, create_agent};
use husk_control::{EndReason, Event, MachineMessage, MachineRequest, Reply, Request};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use slog::Logger;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::agent_client::AgentClient;
use crate::container::{
    Container, CreateRequest, Exit, Follower, Happening, HostMounts, Observer, Status,
};
use crate::io::StdioPaths;
use crate::lock::lock;
use crate::machine::Machine;
use crate::resource::Volumes;

/// Answers every request, and tells what the test wants told.
struct FakeMachine {
    control: OwnedFd,
    /// What became of its processors: true for each time they were told to stand still.
    paused: Mutex<Vec<bool>>,
}

impl FakeMachine {
    fn tell(&self, message: &MachineMessage) {
        husk_control::send(&self.control, message, &[]).unwrap();
    }

    /// As if the guest connected to `port`; the guest's end.
    fn connect(&self, port: u32) -> UnixStream {
        let (host, guest) = StdStream::pair().unwrap();
        let event = MachineMessage::Event(Event::Connection { port });
        husk_control::send(&self.control, &event, &[host.as_fd()]).unwrap();
        guest.set_nonblocking(true).unwrap();
        UnixStream::from_std(guest).unwrap()
    }

    fn serve(self: Arc<Self>) {
        while let Ok(Some(packet)) = husk_control::receive::<Request>(&self.control) {
            let Request { id, request } = packet.message;
            match request {
                MachineRequest::Boot(_) => panic!("booted"),
                MachineRequest::Pause => lock(&self.paused).push(true),
                MachineRequest::Resume => lock(&self.paused).push(false),
                _ => {}
            }
            self.tell(&MachineMessage::Reply { id, result: Ok(Reply::Done) });
        }
    }
}

/// One container at a time; its init writes when it is started and exits when it is signalled.
struct FakeAgent {
    machine: Arc<FakeMachine>,
    streams: Mutex<Option<Streams>>,
    output: Mutex<HashMap<u32, UnixStream>>,
    written: Mutex<u64>,
    status: watch::Sender<Option<u32>>,
}

#[async_trait]
impl Agent for FakeAgent {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let port = request.streams.stdout_port;
        lock(&self.output).insert(port, self.machine.connect(port));
        *lock(&self.streams) = request.streams.into_option();
        Ok(CreateContainerResponse { pid: 5, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
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
            ..Default::default()
        })
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
        Ok(Empty::new())
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<(String, Happening)>>);

impl Observer for Heard {
    fn happened(&self, container_id: &str, exec_id: &str, pid: u32, happening: Happening) {
        assert_eq!((exec_id, pid), ("", 77));
        lock(&self.0).push((container_id.to_owned(), happening));
    }
}

struct Stage {
    folder: tempfile::TempDir,
    machine: Arc<FakeMachine>,
    heard: Arc<Heard>,
    follower: Follower,
    volumes: Volumes,
    _server: Server,
}

async fn stage() -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let log = Logger::root(slog::Discard, slog::o!());
    let (ours, theirs) = husk_control::socket_pair().unwrap();
    let fake = Arc::new(FakeMachine { control: theirs, paused: Mutex::default() });
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
    let agent = FakeAgent {
        machine: Arc::clone(&fake),
        streams: Mutex::default(),
        output: Mutex::default(),
        written: Mutex::default(),
        status: watch::Sender::new(None),
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
        "c",
        Arc::new(machine),
        AgentClient::new(host),
        Arc::clone(&heard) as Arc<dyn Observer>,
        HostMounts::default(),
        log,
    );
    std::fs::create_dir_all(folder.path().join("bundle/rootfs/etc")).unwrap();
    std::fs::create_dir(folder.path().join("share")).unwrap();
    nix::unistd::mkfifo(&folder.path().join("out"), Mode::S_IRWXU).unwrap();
    let volumes = Volumes::create(&folder.path().join("share")).unwrap();
    Stage { folder, machine: fake, heard, follower, volumes, _server: server }
}

impl Stage {
    fn share(&self) -> std::path::PathBuf {
        self.folder.path().join("share")
    }

    fn assert_nothing_shared(&self) {
        let count = |path: &Path| std::fs::read_dir(path).unwrap().count();
        assert_eq!((count(&self.share()), count(&self.share().join(".volumes"))), (1, 0));
    }

    async fn create(&self) -> Container {
        let spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"},
            "mounts": [{"destination": "/b", "type": "bind", "source": "/etc/hostname",
                        "options": ["rbind", "ro"]}],
        });
        let request = CreateRequest {
            id: "c".to_owned(),
            bundle: self.folder.path().join("bundle"),
            spec: serde_json::from_value(spec).unwrap(),
            rootfs: Vec::new(),
            stdio: StdioPaths {
                stdout: self.folder.path().join("out").to_string_lossy().into_owned(),
                ..StdioPaths::default()
            },
        };
        let share = self.share();
        Container::create(request, &share, &self.volumes, self.follower.clone()).await.unwrap()
    }
}

/// In a thread with a mount namespace of its own; not at all where that is forbidden.
fn apart<T: Future<Output = ()>>(test: impl FnOnce() -> T + Send + 'static) {
    let thread = std::thread::spawn(move || {
        let none = None::<&str>;
        let own = unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none));
        if own.is_err() {
            eprintln!("no mount namespace: not tested here");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

#[test]
fn the_exit_comes_after_the_start_and_the_last_byte_and_leaves_nothing() {
    apart(|| async {
        let stage = stage().await;
        let container = stage.create().await;
        let share = stage.share();
        assert!(share.join("c/rootfs/etc").is_dir());
        assert!(std::fs::write(share.join(".volumes/0"), "x").is_err(), "read-only");
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
        assert!(Path::new("/etc/hostname").exists());
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
