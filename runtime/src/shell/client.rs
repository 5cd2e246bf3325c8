//! The operator's side: the person's terminal, or pipes, at one end, the shell's streams at the other.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use husk_control::PacketError;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};

use super::message::{Answer, Question};
use super::program::{self, ProgramError};
use super::short;
use crate::machine::{MachineError, receive, send, watched_fd};

/// As much as a pipe holds.
const BUFFER: usize = 64 << 10;

/// How long the last output may stand still before it is given up.
const STILL: Duration = Duration::from_secs(10);

/// Programs that the shell's own finds by name are in it; others come with the containers.
const SEARCH_PATH: &str = "PATH=/bin:/sbin:/usr/bin:/usr/sbin";

/// A shell to be had.
#[derive(Debug, Clone)]
pub struct ShellCommand {
    /// The sandbox's folder.
    pub folder: PathBuf,
    /// The sandbox's name, for errors.
    pub sandbox: String,
    /// The program on this host.
    pub program: PathBuf,
    /// What the program is called as, and its arguments.
    pub arguments: Vec<String>,
}

/// Why there is no shell, or how it was lost.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// It is not allowed.
    #[error(
        "the sandbox {0} has no door for a shell: set `guest.debug_shell = true` in husk.toml, and start \
         the sandbox anew"
    )]
    NotAllowed(String),
    /// The program cannot be the shell.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The shim cannot be reached, or not any more.
    #[error("the shim of the sandbox")]
    Shim(#[source] io::Error),
    /// What came from the shim was no answer.
    #[error("the shim of the sandbox")]
    Control(#[from] PacketError),
    /// The shim, or the agent behind it, says why.
    #[error("no shell: {0}")]
    Failed(String),
    /// It hung up without an answer.
    #[error("the sandbox has ended")]
    Ended,
    /// The terminal, or a pipe.
    #[error("the terminal")]
    Terminal(#[source] io::Error),
}

impl From<MachineError> for ShellError {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Control(error) => Self::Control(error),
            _ => Self::Ended,
        }
    }
}

/// Runs a shell between this process's standard streams; its exit status.
pub fn run(command: ShellCommand) -> Result<u8, ShellError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(ShellError::Terminal)?.block_on(attach(command));
    // Reading the input may still wait for a key; the process's end ends it.
    done
}

async fn attach(command: ShellCommand) -> Result<u8, ShellError> {
    let shim = call(&command)?;
    let program = program::open(&command.program)?;
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let (rows, columns) = if terminal { size() } else { (0, 0) };
    let kind = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
    let environment = vec![SEARCH_PATH.to_owned(), "HOME=/".to_owned(), format!("TERM={kind}")];
    let arguments = command.arguments;
    let start = Question::Start { arguments, environment, terminal, rows, columns };
    send(&shim, &start, &[program.as_fd()]).await?;
    let mut packet = receive::<Answer>(&shim).await?.ok_or(ShellError::Ended)?;
    match packet.message.clone() {
        Answer::Started => {}
        Answer::Failed { reason } => return Err(ShellError::Failed(reason)),
        Answer::Exited { .. } => return Err(ShellError::Ended),
    }
    let _raw = if terminal { Some(Raw::set()?) } else { None };
    let mut end = |number| stream(packet.take(number)?);
    feed(end(0)?);
    let output = Drain::start(end(1)?, io::stdout());
    let errors = if terminal { None } else { Some(Drain::start(end(2)?, io::stderr())) };
    let (status, bytes, error_bytes) = follow(&shim, terminal).await?;
    output.wait(bytes).await;
    if let Some(errors) = errors {
        errors.wait(error_bytes).await;
    }
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

/// The shim's socket.
fn call(command: &ShellCommand) -> Result<AsyncFd<OwnedFd>, ShellError> {
    let (_folder, path) = short(&command.folder).map_err(ShellError::Shim)?;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let socket = socket.map_err(|error| ShellError::Shim(error.into()))?;
    let connected = UnixAddr::new(&path).and_then(|address| connect(socket.as_raw_fd(), &address));
    match connected {
        Err(Errno::ENOENT) => return Err(ShellError::NotAllowed(command.sandbox.clone())),
        Err(error) => return Err(ShellError::Shim(error.into())),
        Ok(()) => {}
    }
    let waiting = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(waiting))
        .map_err(io::Error::from)
        .and_then(|_| watched_fd(socket))
        .map_err(ShellError::Shim)
}

/// One that threads may wait on.
fn stream(end: OwnedFd) -> Result<UnixStream, ShellError> {
    let stream = UnixStream::from(end);
    stream.set_nonblocking(false).map_err(ShellError::Terminal)?;
    Ok(stream)
}

/// Tells of changes of size until the shell has exited: its status, and what it has written.
async fn follow(shim: &AsyncFd<OwnedFd>, terminal: bool) -> Result<(u32, u64, u64), ShellError> {
    let mut resized = signal(SignalKind::window_change()).map_err(ShellError::Terminal)?;
    loop {
        tokio::select! {
            answer = receive::<Answer>(shim) => {
                return match answer?.ok_or(ShellError::Ended)?.message {
                    Answer::Exited { status, output, error } => Ok((status, output, error)),
                    Answer::Failed { reason } => Err(ShellError::Failed(reason)),
                    Answer::Started => continue,
                };
            }
            Some(()) = resized.recv(), if terminal => {
                let (rows, columns) = size();
                send(shim, &Question::Resize { rows, columns }, &[]).await?;
            }
        }
    }
}

/// Standard input into the shell's, to its end. Nobody waits for it.
fn feed(stream: UnixStream) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; BUFFER];
        while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
            if (&stream).write_all(&buffer[..count]).is_err() {
                return;
            }
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // Held until the shell's end is closed: a stream that is gone would be a reset, not an end.
        let _ = (&stream).read(&mut buffer);
    });
}

/// The shell's output on its way out.
struct Drain {
    bytes: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
}

impl Drain {
    fn start(mut stream: UnixStream, mut sink: impl Write + Send + 'static) -> Self {
        let drain = Self { bytes: Arc::default(), done: Arc::default() };
        let (bytes, done) = (Arc::clone(&drain.bytes), Arc::clone(&drain.done));
        std::thread::spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                // A reader that has gone takes nothing more; the shell is not told.
                let _ = sink.write_all(&buffer[..count]).and_then(|()| sink.flush());
                bytes.fetch_add(count as u64, Ordering::Release);
            }
            done.store(true, Ordering::Release);
        });
        drain
    }

    /// Waits until that much has gone out, or nothing moves any more.
    async fn wait(&self, wanted: u64) {
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            let bytes = self.bytes.load(Ordering::Acquire);
            if bytes >= wanted || self.done.load(Ordering::Acquire) {
                return;
            }
            if bytes != seen {
                (seen, since) = (bytes, Instant::now());
            }
            if since.elapsed() > STILL {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The terminal in raw mode; dropping sets it back.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self, ShellError> {
        let before = tcgetattr(io::stdin()).map_err(|error| ShellError::Terminal(error.into()))?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
            .map_err(|error| ShellError::Terminal(error.into()))?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// The terminal's rows and columns.
fn size() -> (u32, u32) {
    let size = rustix::termios::tcgetwinsize(io::stdin());
    size.map_or((0, 0), |size| (size.ws_row.into(), size.ws_col.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_without_the_door_names_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let command = ShellCommand {
            folder: folder.path().to_owned(),
            sandbox: "s1".to_owned(),
            program: "/bin/busybox".into(),
            arguments: vec!["sh".to_owned()],
        };
        let error = run(command.clone()).unwrap_err().to_string();
        assert!(error.contains("s1") && error.contains("guest.debug_shell = true"), "{error}");
        // One whose shim has gone.
        let (_folder, path) = short(folder.path()).unwrap();
        let left = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None);
        let left = left.unwrap();
        nix::sys::socket::bind(left.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        drop(left);
        assert!(matches!(run(command), Err(ShellError::Shim(_))));
    }
}
