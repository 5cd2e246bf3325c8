//! The shim's side.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use husk_agent_protocols::agent::StartShellRequest;
use husk_control::{Packet, PacketError};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use slog::{Logger, info, warn};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::message::{Answer, Question};
use super::{SOCKET, short};
use crate::container::{ContainerError, Follower};
use crate::error::chain;
use crate::machine::{MachineError, receive, send, watched_fd};

/// For what the operator's command does at once.
const PROMPT: Duration = Duration::from_secs(10);

/// How long the machine's end may take to be seen after its agent's.
const MACHINE_END: Duration = Duration::from_secs(2);

/// For what is left of the output once the shell has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(60);

/// Where `husk exec` comes to; dropping it ends every shell.
#[derive(Debug)]
pub struct ShellDoor {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl ShellDoor {
    /// Listens in the sandbox's `folder`, which only root can enter.
    pub fn open(folder: &Path, follower: Follower, log: &Logger) -> io::Result<Self> {
        let path = folder.join(SOCKET);
        let (_folder, short) = short(folder)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&short)?)?;
        listen(&socket, Backlog::new(8)?)?;
        let socket = watched_fd(socket)?;
        let task = tokio::spawn(attend(socket, follower, log.clone()));
        Ok(Self { path, task })
    }
}

impl Drop for ShellDoor {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn attend(socket: AsyncFd<OwnedFd>, follower: Follower, log: Logger) {
    let numbers = Arc::new(AtomicU64::new(1));
    // Ends all with this task.
    let mut visits = JoinSet::new();
    loop {
        while visits.try_join_next().is_some() {}
        let visitor = match accept(&socket).await {
            Ok(visitor) => visitor,
            Err(error) => {
                warn!(log, "no more shells"; "error" => %error);
                return;
            }
        };
        let id = numbers.fetch_add(1, Ordering::Relaxed).to_string();
        let (follower, log) = (follower.clone(), log.clone());
        visits.spawn(async move {
            info!(log, "shell asked for"; "shell" => &id);
            let reason = match visit(&visitor, &id, &follower).await {
                Ok(()) => return info!(log, "shell ended"; "shell" => id),
                Err(reason) => reason,
            };
            warn!(log, "shell failed"; "shell" => id, "reason" => &reason);
            // Whoever asked may have gone.
            let _ = send(&visitor, &Answer::Failed { reason }, &[]).await;
        });
    }
}

/// The next one who comes, if it is root.
async fn accept(socket: &AsyncFd<OwnedFd>) -> io::Result<AsyncFd<OwnedFd>> {
    loop {
        let mut ready = socket.readable().await?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let visitor = match accept4(socket.get_ref().as_raw_fd(), flags) {
            Err(nix::errno::Errno::EAGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(nix::errno::Errno::ECONNABORTED | nix::errno::Errno::EINTR) => continue,
            result => own(result?),
        };
        // The folder is root's alone; this holds should anyone open it.
        if getsockopt(&visitor, PeerCredentials).is_ok_and(|peer| peer.uid() == 0) {
            return watched_fd(visitor);
        }
    }
}

fn own(descriptor: std::os::fd::RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept4 has just made this descriptor for us; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// One shell, from the first question to the last answer.
async fn visit(visitor: &AsyncFd<OwnedFd>, id: &str, follower: &Follower) -> Result<(), String> {
    let text = |error: PacketError| chain(&error);
    let first = tokio::time::timeout(PROMPT, receive::<Question>(visitor)).await;
    let packet = first.map_err(|_| "nothing was asked".to_owned())?.map_err(text)?;
    let Some(mut packet) = packet else { return Ok(()) };
    let program = packet.take(0).map_err(text)?;
    let (call, terminal) = call(id, packet)?;
    // While it lives, the machine's processors run, even if every container is paused.
    let _awake = follower.agent.stay_awake().await;
    let mut ends = Ends::open(call, terminal, follower).await.map_err(|error| chain(&error))?;
    let feeding = ends.feed(program);
    let started = follower.explained(follower.agent.start_shell(&ends.call).await);
    feeding.abort();
    let lived = match started {
        Ok(_) => live(visitor, id, &mut ends, follower).await,
        Err(error) => Err(chain(&error)),
    };
    ends.close(follower).await;
    lived
}

/// The call that starts it, without its ports, and whether it has a terminal.
fn call(id: &str, packet: Packet<Question>) -> Result<(StartShellRequest, bool), String> {
    let Question::Start { arguments, environment, terminal, rows, columns } = packet.message else {
        return Err("a shell must be started first".to_owned());
    };
    let mut call = StartShellRequest::new();
    id.clone_into(&mut call.shell_id);
    (call.arguments, call.environment) = (arguments, environment);
    let streams = call.streams.mut_or_insert_default();
    (streams.terminal, streams.rows, streams.columns) = (terminal, rows, columns);
    Ok((call, terminal))
}

/// From its start to its end; the agent has forgotten it then.
async fn live(
    visitor: &AsyncFd<OwnedFd>,
    id: &str,
    ends: &mut Ends,
    follower: &Follower,
) -> Result<(), String> {
    let lived = async {
        let streams = ends.streams().await?;
        let streams: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
        send(visitor, &Answer::Started, &streams).await.map_err(|error| chain(&error))?;
        drop(streams);
        tokio::select! {
            exit = follower.agent.wait_process("", id) => {
                let exit = match exit {
                    Ok(exit) => exit,
                    // A connection may break shortly before the machine is seen to end.
                    Err(error) => {
                        let end = tokio::time::timeout(MACHINE_END, follower.machine.end()).await;
                        return Err(end.map_or_else(|_| chain(&error), |end| end.reason));
                    }
                };
                let (output, error) = (exit.stdout_bytes, exit.stderr_bytes);
                let answer = Answer::Exited { status: exit.exit_status, output, error };
                send(visitor, &answer, &[]).await.map_err(|error| chain(&error))?;
                // Its streams close with it: first the last output.
                let _ = tokio::time::timeout(LAST_OUTPUT, hear(visitor, id, follower)).await;
                Ok(())
            }
            end = follower.machine.end() => Err(end.reason),
            () = hear(visitor, id, follower) => Ok(()),
        }
    };
    let lived = lived.await;
    // Fails only with the machine, and the shell with it.
    let _ = follower.agent.delete_shell(id).await;
    lived
}

/// Does what is asked until the visitor hangs up.
async fn hear(visitor: &AsyncFd<OwnedFd>, id: &str, follower: &Follower) {
    while let Ok(Some(packet)) = receive::<Question>(visitor).await {
        if let Question::Resize { rows, columns } = packet.message {
            let _ = follower.agent.resize_terminal("", id, rows, columns).await;
        }
    }
}

/// The ports of a shell, and who connects to them.
struct Ends {
    call: StartShellRequest,
    program: Option<oneshot::Receiver<OwnedFd>>,
    streams: Vec<oneshot::Receiver<OwnedFd>>,
}

impl Ends {
    async fn open(
        mut call: StartShellRequest,
        terminal: bool,
        follower: &Follower,
    ) -> Result<Self, ContainerError> {
        let ports: Vec<_> =
            (0..if terminal { 3 } else { 4 }).map(|_| follower.next_port()).collect();
        let mut ends = Self { call: call.clone(), program: None, streams: Vec::new() };
        for (number, port) in ports.iter().enumerate() {
            let failed = |error: MachineError| ContainerError::MachineEnded(chain(&error));
            let end = follower.machine.listen_once(*port).await.map_err(failed)?;
            match number {
                0 => ends.program = Some(end),
                _ => ends.streams.push(end),
            }
        }
        call.program_port = ports[0];
        let streams = call.streams.mut_or_insert_default();
        (streams.stdin_port, streams.stdout_port) = (ports[1], ports[2]);
        streams.stderr_port = ports.get(3).copied().unwrap_or(0);
        ends.call = call;
        Ok(ends)
    }

    /// Sends the program once the agent has called for it.
    fn feed(&mut self, program: OwnedFd) -> JoinHandle<()> {
        let end = self.program.take();
        tokio::spawn(async move {
            let Some(Ok(stream)) = (match end {
                Some(end) => Some(end.await),
                None => None,
            }) else {
                return;
            };
            let copied = tokio::task::spawn_blocking(move || {
                let stream = std::os::unix::net::UnixStream::from(stream);
                stream.set_nonblocking(false)?;
                // The agent gives up after that long.
                stream.set_write_timeout(Some(LAST_OUTPUT))?;
                io::copy(&mut File::from(program), &mut &stream)?;
                stream.shutdown(std::net::Shutdown::Write)?;
                // Held until the agent has closed its end: a stream that is gone would be a reset.
                io::copy(&mut &stream, &mut io::sink())
            });
            let _ = copied.await;
        })
    }

    /// The streams, which the agent has connected when it has answered.
    async fn streams(&mut self) -> Result<Vec<OwnedFd>, String> {
        let mut streams = Vec::new();
        for end in &mut self.streams {
            let stream = tokio::time::timeout(PROMPT, end).await;
            let stream = stream.ok().and_then(Result::ok);
            streams.push(stream.ok_or("the agent has not connected a stream")?);
        }
        Ok(streams)
    }

    async fn close(self, follower: &Follower) {
        let streams = &self.call.streams;
        let ports = [streams.stdin_port, streams.stdout_port, streams.stderr_port];
        for port in ports.into_iter().chain([self.call.program_port]).filter(|port| *port != 0) {
            follower.machine.unlisten(port).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::{Stage, apart, stage};
    use nix::sys::socket::connect;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    struct Visitor(AsyncFd<OwnedFd>);

    impl Visitor {
        fn at(stage: &Stage) -> Self {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
            let path = stage.folder.path().join(SOCKET);
            connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
            Self(watched_fd(socket).unwrap())
        }

        async fn start(&self, stage: &Stage, program: &str) -> Packet<Answer> {
            let path = stage.folder.path().join("program");
            std::fs::write(&path, program).unwrap();
            let start = Question::Start {
                arguments: ["a", "b", "c"].map(str::to_owned).to_vec(),
                environment: Vec::new(),
                terminal: true,
                rows: 24,
                columns: 80,
            };
            let program = File::open(path).unwrap();
            send(&self.0, &start, &[program.as_fd()]).await.unwrap();
            self.hears().await
        }

        async fn hears(&self) -> Packet<Answer> {
            receive::<Answer>(&self.0).await.unwrap().unwrap()
        }
    }

    #[test]
    fn a_shell_is_started_followed_and_forgotten() {
        apart(|| async {
            let stage = stage().await;
            let log = Logger::root(slog::Discard, slog::o!());
            let door = ShellDoor::open(stage.folder.path(), stage.follower.clone(), &log).unwrap();

            let visitor = Visitor::at(&stage);
            let mut packet = visitor.start(&stage, "program").await;
            assert_eq!(packet.message, Answer::Started);
            let [mut input, mut output] =
                [0, 1].map(|number| UnixStream::from(packet.take(number).unwrap()));
            packet.take(2).unwrap_err();
            input.write_all(b"through").unwrap();
            input.shutdown(std::net::Shutdown::Write).unwrap();
            let exited = Answer::Exited { status: 3, output: 0, error: 0 };
            assert_eq!(visitor.hears().await.message, exited);
            let mut text = [0; 7];
            output.set_nonblocking(false).unwrap();
            output.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"through");
            drop(visitor);
            tokio::time::timeout(PROMPT, stage.deleted.notified()).await.unwrap();

            let refused = Visitor::at(&stage).start(&stage, "because").await.message;
            assert_eq!(refused, Answer::Failed { reason: "because".to_owned() });
            // Something else than a start, and a start without a program.
            let visitor = Visitor::at(&stage);
            send(&visitor.0, &Question::Resize { rows: 1, columns: 1 }, &[]).await.unwrap();
            assert!(matches!(visitor.hears().await.message, Answer::Failed { .. }));

            drop(door);
            assert!(!stage.folder.path().join(SOCKET).exists());
        });
    }
}
