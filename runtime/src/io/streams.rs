//! The three streams of one process.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_agent_protocols::agent;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::copier::{Patience, Progress, delivered};
use super::copier::{copy_in, copy_out};
use super::location::{Location, LocationError, Sink, Source};
use super::logger::{Logger, Origin};
use crate::lock::lock;
use crate::machine::{Machine, MachineError, StreamAddress};

/// Before the exit is told without its last bytes. The guest has said that they are coming.
const EXIT_PATIENCE: Patience =
    Patience { reader: Duration::from_secs(1), guest: Duration::from_secs(30) };

/// Before the streams are closed. What the exited process left running may hold them open.
const CLOSE_PATIENCE: Patience =
    Patience { reader: Duration::from_secs(1), guest: Duration::from_secs(1) };

/// Where containerd wants the streams of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Standard input; empty for none.
    pub stdin: String,
    /// Standard output; empty for none.
    pub stdout: String,
    /// Standard error; empty for none, and unused with a terminal.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// Why the streams of a process cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    /// containerd's side.
    #[error("standard {stream}")]
    Location {
        /// `input`, `output` or `error`.
        stream: &'static str,
        /// Why.
        #[source]
        source: LocationError,
    },
    /// The machine's side.
    #[error("streams of the process")]
    Machine(#[source] MachineError),
}

/// The host's side of a process's streams. Dropping it ends the copiers and closes the FIFOs.
#[derive(Debug)]
pub struct Streams {
    machine: Arc<Machine>,
    /// Addresses of standard input, output and error; `None` for a stream that is not wanted.
    ends: [Option<StreamAddress>; 3],
    terminal: bool,
    /// The writing end of standard input, held until `CloseIO`.
    keeper: Mutex<Option<std::fs::File>>,
    stdout: watch::Receiver<Progress>,
    stderr: watch::Receiver<Progress>,
    copiers: Vec<JoinHandle<()>>,
    /// Takes both streams of output; `None` if they go elsewhere.
    logger: Option<Logger>,
}

impl Streams {
    /// Opens the FIFOs, or starts the logger, and listens on a port of its own for each stream; copying
    /// begins when the agent connects.
    pub async fn open(
        paths: &StdioPaths,
        machine: &Arc<Machine>,
        origin: Origin<'_>,
    ) -> Result<Self, StreamsError> {
        let located = |stream| move |source| StreamsError::Location { stream, source };
        let (stdin, output) = tokio::join!(open_source(&paths.stdin), Output::open(paths, origin));
        let stdin = stdin.map_err(located("input"))?;
        let Output { stdout, stderr, logger } = output?;
        let mut streams = Self {
            machine: Arc::clone(machine),
            ends: [None; 3],
            terminal: paths.terminal,
            keeper: Mutex::new(None),
            stdout: watch::channel(Progress::default()).1,
            stderr: watch::channel(Progress::default()).1,
            copiers: Vec::new(),
            logger,
        };
        let (input, output, errors) = tokio::join!(
            listen(machine, stdin.is_some()),
            listen(machine, stdout.is_some()),
            listen(machine, stderr.is_some())
        );
        // From here on dropping `streams` stops listening, also to those beside one that failed.
        let address = |listening: &Result<Option<Listening>, _>| {
            listening.as_ref().ok()?.as_ref().map(|(address, _)| *address)
        };
        streams.ends = [address(&input), address(&output), address(&errors)];
        let stream = |listening: Result<Option<Listening>, _>| {
            let listening = listening.map_err(StreamsError::Machine)?;
            Ok(listening.map(|(_, stream)| stream))
        };
        let (input, output, errors) = (stream(input)?, stream(output)?, stream(errors)?);
        if let (Some(Source { reading, writing }), Some(stream)) = (stdin, input) {
            *lock(&streams.keeper) = Some(writing);
            streams.copiers.push(tokio::spawn(async move {
                if let Some(stream) = connected(stream).await {
                    copy_in(reading, stream).await;
                }
            }));
        }
        streams.stdout = streams.copy(stdout, output);
        streams.stderr = streams.copy(stderr, errors);
        Ok(streams)
    }

    /// What the agent has to know.
    pub fn for_agent(&self) -> agent::Streams {
        let mut streams = agent::Streams::new();
        [streams.stdin, streams.stdout, streams.stderr] =
            self.ends.map(|end| end.map(Into::into).into());
        streams.terminal = self.terminal;
        streams
    }

    /// Closes our writing end of standard input: once the clients have closed theirs, it ends.
    pub fn close_input(&self) {
        lock(&self.keeper).take();
    }

    /// Waits until so many bytes of output have arrived; gives up if nothing moves.
    pub async fn delivered(&self, stdout: u64, stderr: u64) {
        let (mut out, mut err) = (self.stdout.clone(), self.stderr.clone());
        let all = async {
            tokio::join!(
                delivered(&mut out, wanted(self.ends[1], stdout), EXIT_PATIENCE),
                delivered(&mut err, wanted(self.ends[2], stderr), EXIT_PATIENCE)
            )
        };
        all.await;
    }

    /// Waits until the guest has closed its ends; gives up if nothing moves.
    pub async fn finished(&self) {
        let (mut out, mut err) = (self.stdout.clone(), self.stderr.clone());
        tokio::join!(
            delivered(&mut out, wanted(self.ends[1], u64::MAX), CLOSE_PATIENCE),
            delivered(&mut err, wanted(self.ends[2], u64::MAX), CLOSE_PATIENCE)
        );
    }

    /// Closes what is still open of the output, and sees the logger to its end, if there is one.
    pub async fn end_logger(&self) {
        let Some(logger) = &self.logger else { return };
        for copier in &self.copiers {
            copier.abort();
        }
        logger.end().await;
    }

    fn copy(
        &mut self,
        sink: Option<Sink>,
        stream: Option<oneshot::Receiver<OwnedFd>>,
    ) -> watch::Receiver<Progress> {
        let (sender, receiver) = watch::channel(Progress::default());
        if let (Some(sink), Some(stream)) = (sink, stream) {
            self.copiers.push(tokio::spawn(async move {
                if let Some(stream) = connected(stream).await {
                    copy_out(stream, sink, sender).await;
                }
            }));
        }
        receiver
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for copier in &self.copiers {
            copier.abort();
        }
        let (machine, ends) = (Arc::clone(&self.machine), self.ends);
        tokio::spawn(async move {
            for end in ends.into_iter().flatten() {
                machine.unlisten(end.port).await;
            }
        });
    }
}

async fn open_source(text: &str) -> Result<Option<Source>, LocationError> {
    Location::parse(text)?.open_source().await
}

/// Where the output of a process goes.
struct Output {
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Output {
    /// A logger of standard output takes standard error as well, as with containerd's own shim.
    async fn open(paths: &StdioPaths, origin: Origin<'_>) -> Result<Self, StreamsError> {
        let located = |stream| move |source| StreamsError::Location { stream, source };
        let place = Location::parse(&paths.stdout).map_err(located("output"))?;
        if let Location::Program(program) = place {
            let started = program.start(origin).await.map_err(LocationError::from);
            let (logger, [stdout, stderr]) = started.map_err(located("output"))?;
            if paths.terminal {
                // What cannot be written must not hold up the terminal.
                let (stdout, stderr) = (Some(Sink::Fifo(stdout)), None);
                return Ok(Self { stdout, stderr, logger: Some(logger) });
            }
            let [stdout, stderr] = [stdout, stderr].map(|pipe| Some(Sink::Logger(pipe)));
            return Ok(Self { stdout, stderr, logger: Some(logger) });
        }
        let stderr = if paths.terminal { "" } else { &paths.stderr };
        let (stdout, stderr) = tokio::join!(place.open_sink(), open_sink(stderr));
        let stdout = stdout.map_err(located("output"))?;
        let stderr = stderr.map_err(located("error"))?;
        Ok(Self { stdout, stderr, logger: None })
    }
}

async fn open_sink(text: &str) -> Result<Option<Sink>, LocationError> {
    Location::parse(text)?.open_sink().await
}

fn wanted(end: Option<StreamAddress>, bytes: u64) -> u64 {
    end.map_or(0, |_| bytes)
}

type Listening = (StreamAddress, oneshot::Receiver<OwnedFd>);

async fn listen(machine: &Machine, used: bool) -> Result<Option<Listening>, MachineError> {
    if used { machine.listen().await.map(Some) } else { Ok(None) }
}

/// The stream once the agent has connected; none if the machine is gone before.
async fn connected(stream: oneshot::Receiver<OwnedFd>) -> Option<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(stream.await.ok()?);
    stream.set_nonblocking(true).ok()?;
    UnixStream::from_std(stream).ok()
}
