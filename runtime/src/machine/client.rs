//! The machine process: requests with numbers, connections by port, and its end.
//!
//! One task reads the control socket until the process is gone. Whatever it says is checked: an
//! answer to no request and a connection to no listener are dropped, a packet that is no message
//! ends the process.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_control::{
    EndReason, Event, MachineMessage, MachineRequest, NetworkDevice, Packet, PacketError, Reply,
    Request,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{setsockopt, sockopt};
use slog::{Logger, info, warn};
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use super::pidfd::watched_fd;
use super::{Child, MachineError, NetworkNamespace, OomScore, Program, Role, StreamAddress};
use crate::error::chain;
use crate::lock::lock;

/// Bytes that may be under way to the guest on one stream.
const SEND_BUFFER: usize = 1 << 20;

/// How long a process may outlive its control socket.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long the process may take to answer a request that it can answer by itself: on a host that swaps, or
/// when somebody has stopped it for a while, half a minute is nothing. SIGKILL waits for none of them.
const ANSWER: Duration = Duration::from_secs(60);

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineEnd {
    /// Whether it was told to.
    pub expected: bool,
    /// The signal that has ended all processes in it, if it was one: SIGKILL if the guest did not end a
    /// process that was killed, SIGTERM if the machine's process was sent that.
    pub signal: Option<u32>,
    /// Why, for the person at the terminal.
    pub reason: String,
}

/// What the process has said of its end.
#[derive(Debug, Default)]
struct Told {
    reason: Option<EndReason>,
    expected: bool,
    /// It said something that is no message.
    nonsense: bool,
}

type Answer = (Reply, Option<OwnedFd>);

/// A machine process.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    pid: u32,
    /// `None` without a process of our own.
    oom_score: Option<OomScore>,
}

/// Our end of a stream that the guest is to connect to, and who waits for that. The machine never has
/// it: what it does to its own end cannot make a call on this one wait.
#[derive(Debug)]
struct Listener {
    end: OwnedFd,
    waiting: oneshot::Sender<OwnedFd>,
}

/// The reason for ending a machine whose guest or process does not do as it is told.
#[derive(Debug)]
struct GivenUp {
    reason: String,
    /// A process in it was to be killed.
    killed: bool,
}

#[derive(Debug)]
struct Shared {
    socket: AsyncFd<OwnedFd>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Result<Answer, String>>>>,
    listeners: Mutex<HashMap<u32, Listener>>,
    kill: tokio::sync::Notify,
    /// How it was given up, if it was.
    given_up: Mutex<Option<GivenUp>>,
    end: watch::Sender<Option<MachineEnd>>,
}

impl Machine {
    /// Starts the process; the machine itself comes with [`MachineRequest::Boot`].
    pub fn start(
        program: Program<'_>,
        network: &NetworkNamespace,
        log: &Logger,
    ) -> Result<Self, MachineError> {
        let (child, socket) = Child::spawn(program, Role::Machine, network, log)?;
        let pid = child.pid().as_raw().unsigned_abs();
        let oom_score = child.oom_score();
        let mut machine = Self::over(socket, pid, async move |kill| child.life(kill).await, log)?;
        machine.oom_score = oom_score;
        Ok(machine)
    }

    /// Over a control socket that is already there; `life` ends with the process and says how.
    pub fn over<F, L>(
        socket: OwnedFd,
        pid: u32,
        life: F,
        log: &Logger,
    ) -> Result<Self, MachineError>
    where
        F: FnOnce(Arc<tokio::sync::Notify>) -> L,
        L: Future<Output = String> + Send + 'static,
    {
        let shared = Arc::new(Shared {
            socket: watched(socket)?,
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            listeners: Mutex::default(),
            kill: tokio::sync::Notify::new(),
            given_up: Mutex::default(),
            end: watch::Sender::new(None),
        });
        let kill = Arc::new(tokio::sync::Notify::new());
        let life = life(Arc::clone(&kill));
        tokio::spawn(Arc::clone(&shared).run(life, kill, log.clone()));
        Ok(Self { shared, pid, oom_score: None })
    }

    /// The process id, which stands for the container's on the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sets how soon the host's OOM killer takes the process.
    pub fn set_oom_score(&self, score: i32) -> io::Result<()> {
        self.oom_score.as_ref().map_or(Ok(()), |it| it.set(score))
    }

    /// Sends a request and waits for the answer.
    pub async fn request(
        &self,
        request: MachineRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply, MachineError> {
        self.ask(request, descriptors).await.map(|(reply, _)| reply)
    }

    /// Takes the guest's next connection to `port`, whoever makes it, and hands out its stream: for a
    /// guest in which nothing runs but the agent.
    pub async fn listen_once(&self, port: u32) -> Result<oneshot::Receiver<OwnedFd>, MachineError> {
        self.accept_at(port, None).await
    }

    /// Takes one connection at an address that only the agent will know, and hands out its stream.
    pub async fn listen(
        &self,
    ) -> Result<(StreamAddress, oneshot::Receiver<OwnedFd>), MachineError> {
        let address = loop {
            let address = StreamAddress::random().map_err(MachineError::Random)?;
            // Ends: there are far more ports than listeners.
            if !lock(&self.shared.listeners).contains_key(&address.port) {
                break address;
            }
        };
        let stream = self.accept_at(address.port, Some(address.from)).await?;
        Ok((address, stream))
    }

    async fn accept_at(
        &self,
        port: u32,
        from: Option<u32>,
    ) -> Result<oneshot::Receiver<OwnedFd>, MachineError> {
        let (end, theirs) = pair().map_err(|source| MachineError::Pair { source })?;
        let (waiting, receiver) = oneshot::channel();
        lock(&self.shared.listeners).insert(port, Listener { end, waiting });
        let asked = MachineRequest::Accept { port, from, stream: 0 };
        let asked = self.ask(asked, &[theirs.as_fd()]).await;
        if let Err(error) = asked {
            lock(&self.shared.listeners).remove(&port);
            return Err(error);
        }
        Ok(receiver)
    }

    /// Takes no connection to `port` any more, if one is still awaited.
    pub async fn unlisten(&self, port: u32) {
        if lock(&self.shared.listeners).remove(&port).is_some() {
            // The machine may have ended meanwhile; then nothing listens either.
            let _ = self.ask(MachineRequest::Unlisten { port }, &[]).await;
        }
    }

    /// Plugs a network device into the running machine; the descriptors are those the device names
    /// by their position.
    pub async fn add_network(
        &self,
        device: NetworkDevice,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), MachineError> {
        self.done(MachineRequest::AddNetwork(device), descriptors).await
    }

    /// Unplugs a network device, which the guest should have let go of.
    pub async fn remove_network(&self, id: &str) -> Result<(), MachineError> {
        self.done(MachineRequest::RemoveNetwork { id: id.to_owned() }, &[]).await
    }

    /// Tells the guest that a network device's link has come up or gone down.
    pub async fn set_link(&self, id: &str, up: bool) -> Result<(), MachineError> {
        self.done(MachineRequest::SetLink { id: id.to_owned(), up }, &[]).await
    }

    async fn done(
        &self,
        request: MachineRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), MachineError> {
        match self.request(request, descriptors).await? {
            Reply::Done => Ok(()),
            _ => Err(MachineError::WrongAnswer),
        }
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<MachineEnd> {
        self.shared.end.borrow().clone()
    }

    /// Waits for its end.
    pub async fn end(&self) -> MachineEnd {
        let mut end = self.shared.end.subscribe();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(end)) => end.clone(),
            // The sender lives in `shared`, which we hold.
            _ => {
                MachineEnd { expected: false, signal: None, reason: "the machine ended".to_owned() }
            }
        }
    }

    /// Ends the process at once.
    pub fn kill(&self) {
        self.shared.kill.notify_one();
    }

    /// Ends the process at once, because its guest can no longer be trusted to do as it is told: `reason`
    /// says how that showed.
    pub fn give_up(&self, reason: &str) {
        self.give_up_as(GivenUp { reason: reason.to_owned(), killed: false });
    }

    /// Ends the process at once, because its guest does not end a process that was killed: SIGKILL
    /// ends all others with it.
    pub fn kill_all(&self, reason: &str) {
        self.give_up_as(GivenUp { reason: reason.to_owned(), killed: true });
    }

    fn give_up_as(&self, given_up: GivenUp) {
        lock(&self.shared.given_up).get_or_insert(given_up);
        self.kill();
    }

    /// Sends a request and waits for the answer, no longer than a process takes that is in order.
    async fn ask(
        &self,
        request: MachineRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, MachineError> {
        // The guest's to bring about: the caller says how long that may take.
        let is_guests =
            matches!(request, MachineRequest::AwaitMemory | MachineRequest::Connect { .. });
        let answer = self.ask_patiently(request, descriptors);
        if is_guests {
            return answer.await;
        }
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                let seconds = ANSWER.as_secs();
                self.give_up(&format!("the machine process did not answer within {seconds} s"));
                Err(MachineError::Ended(self.end().await.reason))
            }
        }
    }

    async fn ask_patiently(
        &self,
        request: MachineRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, MachineError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.shared.waiting).insert(id, sender);
        // Looked at after the insertion: `run` fails what waits only after it has told the end.
        let sent = match self.ended() {
            Some(end) => Err(MachineError::Ended(end.reason)),
            None => send(&self.shared.socket, &Request { id, request }, descriptors).await,
        };
        if let Err(error) = sent {
            lock(&self.shared.waiting).remove(&id);
            return Err(match error {
                // The peer is gone: why it ended says more than that its socket is closed.
                MachineError::Control(PacketError::Socket(_)) => {
                    MachineError::Ended(self.end().await.reason)
                }
                error => error,
            });
        }
        match receiver.await {
            Ok(answer) => answer.map_err(MachineError::Refused),
            Err(_) => Err(MachineError::Ended(self.end().await.reason)),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Shared {
    async fn run(
        self: Arc<Self>,
        life: impl Future<Output = String> + Send + 'static,
        kill: Arc<tokio::sync::Notify>,
        log: Logger,
    ) {
        tokio::pin!(life);
        let mut told = Told::default();
        let how = loop {
            tokio::select! {
                message = receive::<MachineMessage>(&self.socket) => {
                    if self.hear(message, &mut told, &log) {
                        continue;
                    }
                    if told.nonsense {
                        kill.notify_one();
                    }
                    break finish(&mut life, &kill).await;
                }
                how = &mut life => {
                    // What it said last is still in the socket.
                    while self.hear(husk_control::receive(self.socket.get_ref()), &mut told, &log) {}
                    break how;
                }
                () = self.kill.notified() => {
                    told.expected = true;
                    kill.notify_one();
                }
            }
        };
        let Told { reason, mut expected, .. } = told;
        let terminated = reason == Some(EndReason::Terminated);
        let mut signal = terminated.then_some(libc::SIGTERM.unsigned_abs());
        let mut reason = reason.map_or(how, |reason| reason.to_string());
        if let Some(given_up) = lock(&self.given_up).take() {
            (reason, expected) = (given_up.reason, false);
            signal = given_up.killed.then_some(libc::SIGKILL.unsigned_abs());
        }
        if expected {
            info!(log, "machine ended"; "reason" => &reason);
        } else {
            warn!(log, "machine ended unasked"; "reason" => &reason);
        }
        self.end.send_replace(Some(MachineEnd { expected, signal, reason }));
        lock(&self.waiting).clear();
        lock(&self.listeners).clear();
    }

    /// Takes in what came over the socket; false if nothing more will come.
    fn hear(
        &self,
        message: Result<Option<Packet<MachineMessage>>, PacketError>,
        told: &mut Told,
        log: &Logger,
    ) -> bool {
        match message {
            Ok(Some(packet)) => {
                if let Some(reason) = self.take(packet, log) {
                    told.expected |= reason == EndReason::PoweredOff;
                    told.reason = Some(reason);
                }
                true
            }
            Ok(None) => false,
            Err(error) => {
                if !error.is_would_block() {
                    let error = chain(&error);
                    told.nonsense = true;
                    told.reason = Some(EndReason::Failed { error });
                }
                false
            }
        }
    }

    /// Does what a packet says; returns why the machine ended if it is that.
    fn take(&self, mut packet: Packet<MachineMessage>, log: &Logger) -> Option<EndReason> {
        let message = packet.message.clone();
        match message {
            MachineMessage::Reply { id, result } => {
                let fd = packet.take(0).ok();
                if let Some(waiting) = lock(&self.waiting).remove(&id) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(result.map(|reply| (reply, fd)));
                }
            }
            MachineMessage::Event(Event::Connection { port }) => {
                match lock(&self.listeners).remove(&port) {
                    // Whoever waited may have given up.
                    Some(Listener { end, waiting }) => drop(waiting.send(end)),
                    None => warn!(log, "connection nobody waits for"; "port" => port),
                }
            }
            MachineMessage::Event(Event::Ended { reason }) => return Some(reason),
        }
        None
    }
}

/// Waits for the end of a process whose control socket is closed, and helps it if it dawdles.
async fn finish(
    life: &mut (impl Future<Output = String> + Unpin),
    kill: &tokio::sync::Notify,
) -> String {
    match tokio::time::timeout(FAREWELL, &mut *life).await {
        Ok(how) => how,
        Err(_) => {
            kill.notify_one();
            life.await
        }
    }
}

/// The two ends of a stream: ours, the machine's.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    // Only for speed, so that a failure does not matter.
    let _ = setsockopt(&ours, sockopt::SndBuf, &SEND_BUFFER);
    Ok((ours.into(), theirs.into()))
}

/// Makes a control socket wait in the event loop instead of in the kernel.
pub(super) fn watched(socket: OwnedFd) -> Result<AsyncFd<OwnedFd>, MachineError> {
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(io::Error::from)
        .and_then(|_| watched_fd(socket))
        .map_err(|source| MachineError::Watch { program: "husk-vmm".into(), source })
}

pub(crate) async fn send<T: serde::Serialize>(
    socket: &AsyncFd<OwnedFd>,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), MachineError> {
    loop {
        let lost = |error: io::Error| MachineError::Ended(error.to_string());
        let mut ready = socket.writable().await.map_err(lost)?;
        match husk_control::send(socket.get_ref().as_fd(), message, descriptors) {
            Err(error) if error.is_would_block() => ready.clear_ready(),
            result => return result.map_err(MachineError::Control),
        }
    }
}

pub(crate) async fn receive<T: serde::de::DeserializeOwned>(
    socket: &AsyncFd<OwnedFd>,
) -> Result<Option<Packet<T>>, PacketError> {
    loop {
        // An event loop that is going away: as if the peer had closed.
        let Ok(mut ready) = socket.readable().await else { return Ok(None) };
        match husk_control::receive(socket.get_ref().as_fd()) {
            Err(error) if error.is_would_block() => ready.clear_ready(),
            result => return result,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn machine() -> (Machine, OwnedFd, oneshot::Sender<String>) {
        let log = Logger::root(slog::Discard, slog::o!());
        let (ours, theirs) = husk_control::socket_pair().unwrap();
        let (dead, death) = oneshot::channel();
        let life = async move |_| death.await.unwrap_or_default();
        (Machine::over(ours, 77, life, &log).unwrap(), theirs, dead)
    }

    fn next(socket: &OwnedFd) -> Request {
        husk_control::receive::<Request>(socket).unwrap().unwrap().message
    }

    #[tokio::test]
    async fn answers_find_their_requests_and_streams_their_listeners() {
        let (machine, theirs, _dead) = machine();
        let peer = tokio::task::spawn_blocking(move || {
            let (mut first, mut second) = (next(&theirs), next(&theirs));
            if first.request == MachineRequest::Pause {
                std::mem::swap(&mut first, &mut second);
            }
            let refused = Err("no".to_owned());
            let reply = MachineMessage::Reply { id: second.id, result: refused };
            husk_control::send(&theirs, &reply, &[]).unwrap();
            let reply = MachineMessage::Reply { id: first.id, result: Ok(Reply::Done) };
            husk_control::send(&theirs, &reply, &[]).unwrap();
            for port in [9, 5] {
                let event = MachineMessage::Event(Event::Connection { port });
                husk_control::send(&theirs, &event, &[]).unwrap();
            }
            theirs
        });
        let (stream, refused) =
            tokio::join!(machine.listen_once(5), machine.request(MachineRequest::Pause, &[]));
        assert!(matches!(refused, Err(MachineError::Refused(text)) if text == "no"));
        stream.unwrap().await.unwrap();
        drop(peer.await.unwrap());
    }

    #[tokio::test]
    async fn what_a_machine_does_to_its_end_of_a_stream_holds_nobody_up() {
        let (machine, theirs, _dead) = machine();
        let peer = tokio::task::spawn_blocking(move || {
            let mut packet = husk_control::receive::<Request>(&theirs).unwrap().unwrap();
            let Request { id, request } = packet.message.clone();
            let MachineRequest::Accept { port, stream, .. } = request else {
                panic!("{request:?}")
            };
            let end = packet.take(stream).unwrap();
            fcntl(&end, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            for message in [
                MachineMessage::Reply { id, result: Ok(Reply::Done) },
                MachineMessage::Event(Event::Connection { port }),
            ] {
                // A descriptor of the machine's own is not taken.
                husk_control::send(&theirs, &message, &[end.as_fd()]).unwrap();
            }
            (theirs, end)
        });
        let stream = machine.listen_once(5).await.unwrap().await.unwrap();
        let stream = std::os::unix::net::UnixStream::from(stream);
        stream.set_nonblocking(true).unwrap();
        let (_theirs, end) = peer.await.unwrap();
        fcntl(&end, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let error = std::io::Read::read(&mut &stream, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        std::io::Write::write_all(&mut std::fs::File::from(end), b"x").unwrap();
        assert_eq!(std::io::Read::read(&mut &stream, &mut [0]).unwrap(), 1);
    }

    #[tokio::test]
    async fn network_devices_come_change_and_go() {
        let (machine, theirs, _dead) = machine();
        let peer = tokio::task::spawn_blocking(move || {
            let mut asked = Vec::new();
            for _ in 0..3 {
                let request = next(&theirs);
                let reply = MachineMessage::Reply { id: request.id, result: Ok(Reply::Done) };
                husk_control::send(&theirs, &reply, &[]).unwrap();
                asked.push(request.request);
            }
            let request = next(&theirs);
            let reply = MachineMessage::Reply { id: request.id, result: Ok(Reply::Connected) };
            husk_control::send(&theirs, &reply, &[]).unwrap();
            asked
        });
        let device = NetworkDevice {
            id: "eth0".to_owned(),
            queues: vec![0],
            vhost: Vec::new(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1450),
            receive_limit: None,
            send_limit: None,
        };
        let tap = std::fs::File::open("/dev/null").unwrap();
        machine.add_network(device.clone(), &[tap.as_fd()]).await.unwrap();
        machine.set_link("eth0", false).await.unwrap();
        machine.remove_network("eth0").await.unwrap();
        let odd = machine.remove_network("eth0").await;
        assert!(matches!(odd, Err(MachineError::WrongAnswer)));
        let id = "eth0".to_owned();
        let expected = [
            MachineRequest::AddNetwork(device),
            MachineRequest::SetLink { id: id.clone(), up: false },
            MachineRequest::RemoveNetwork { id },
        ];
        assert_eq!(peer.await.unwrap(), expected);
    }

    #[tokio::test]
    async fn what_it_said_last_is_why_it_ended() {
        let (machine, theirs, dead) = machine();
        let waiting = machine.request(MachineRequest::Pause, &[]);
        let end = async {
            let event = MachineMessage::Event(Event::Ended { reason: EndReason::Panicked });
            husk_control::send(&theirs, &event, &[]).unwrap();
            drop(theirs);
            dead.send("with status 0".to_owned()).unwrap();
            machine.end().await
        };
        let (answer, end) = tokio::join!(waiting, end);
        let panicked = "the guest kernel panicked".to_owned();
        assert_eq!(end, MachineEnd { expected: false, signal: None, reason: panicked.clone() });
        assert!(matches!(answer, Err(MachineError::Ended(reason)) if reason == panicked));
        let later = machine.request(MachineRequest::Pause, &[]).await;
        assert!(matches!(later, Err(MachineError::Ended(_))));
    }

    #[tokio::test]
    async fn a_packet_that_is_no_message_is_the_end() {
        let (machine, theirs, dead) = machine();
        nix::unistd::write(&theirs, b"hello").unwrap();
        dead.send(String::new()).unwrap();
        let end = machine.end().await;
        assert!(end.reason.contains("not understood"), "{end:?}");
    }
}
