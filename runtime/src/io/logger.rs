//! Loggers: programs of the host's that take the output of one process (`binary:///PROGRAM?KEY=VALUE`).
//!
//! The contract is that of containerd's own shim. A logger has standard output at descriptor 3, standard
//! error at 4, and at 5 a pipe that it closes or writes to once it is ready. Its arguments are the names
//! and values of the URI's query, its environment is `CONTAINER_ID` and `CONTAINER_NAMESPACE`. It reads to
//! the end of both streams and ends. One that does not is sent SIGTERM, and at last SIGKILL.

use std::collections::VecDeque;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, chdir, pipe2};
use percent_encoding::percent_decode_str;
use slog::warn;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::apart::HostMounts;
use crate::lock::lock;
use crate::machine::{PidFd, watched_fd};

/// Lowest number of the descriptors that are to become a logger's: none of them is overwritten before it
/// has been copied.
const ABOVE: RawFd = 10;

/// How long a logger may take to become ready.
const READY: Duration = Duration::from_secs(30);

/// How long after the end of its ready pipe a logger that failed is awaited: the pipe ends with it.
const FAILURE: Duration = Duration::from_millis(5);

/// How long after the end of its streams a logger may take to end by itself.
const DRAIN: Duration = Duration::from_secs(1);

/// How long after SIGTERM a logger may take to end, as with containerd's own shim.
const TERMINATE: Duration = Duration::from_secs(12);

/// How long a killed logger is waited for.
const KILLED: Duration = Duration::from_secs(1);

/// Bytes of a logger's error output that its error repeats.
const LAST_WORDS: usize = 1024;

/// A logger's program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggerProgram {
    path: PathBuf,
    arguments: Vec<String>,
}

/// Origin of the output that a logger takes.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Id of the container; of the process for one that was added, as with containerd's own shim.
    pub id: &'a str,
    /// The container's bundle, in which the logger runs.
    pub bundle: &'a Path,
    /// The mount namespace in which the logger runs.
    pub mounts: &'a HostMounts,
    /// The shim's log.
    pub log: &'a slog::Logger,
}

/// Errors of a logger.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The logger cannot be executed or watched.
    #[error("cannot start the logger {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The logger ended before it was ready.
    #[error("cannot log by {path}: it ended {how} before it was ready{words}")]
    Ended {
        /// The program.
        path: PathBuf,
        /// How it ended.
        how: String,
        /// A colon and what it wrote last to its error output; empty if that is nothing.
        words: String,
    },
    /// The logger did not become ready in time.
    #[error(
        "cannot log by {path}: it was not ready within {seconds} s; a logger is ready when it closes \
         descriptor 5{words}"
    )]
    Late {
        /// The program.
        path: PathBuf,
        /// How long it was given.
        seconds: u64,
        /// A colon and what it wrote last to its error output; empty if that is nothing.
        words: String,
    },
}

/// A logger that runs. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Logger {
    path: PathBuf,
    pid: Pid,
    pidfd: Arc<AsyncFd<PidFd>>,
    words: Arc<Mutex<VecDeque<u8>>>,
    /// How it ended; `None` while it runs.
    ended: watch::Receiver<Option<String>>,
    /// Whether its end is wanted.
    ending: Arc<AtomicBool>,
    log: slog::Logger,
}

/// Writing ends of standard output and standard error.
pub(super) type LoggerPipes = [pipe::Sender; 2];

impl LoggerProgram {
    /// Reads what follows `binary://`: an absolute path, and a query. `None` if there is no such path.
    pub(super) fn parse(rest: &str) -> Option<Self> {
        let rest = rest.split('#').next()?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path: Vec<u8> = percent_decode_str(path).collect();
        let path = PathBuf::from(OsStr::from_bytes(&path));
        let mut arguments: Vec<String> = Vec::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            // Of a name that is repeated only the first value counts.
            if !arguments.iter().step_by(2).any(|known| *known == name) {
                arguments.extend([name.into_owned(), value.into_owned()]);
            }
        }
        path.is_absolute().then_some(Self { path, arguments })
    }

    /// Starts the logger and waits until it is ready.
    pub(super) async fn start(
        &self,
        origin: Origin<'_>,
    ) -> Result<(Logger, LoggerPipes), LoggerError> {
        self.start_within(origin, READY).await
    }

    async fn start_within(
        &self,
        origin: Origin<'_>,
        limit: Duration,
    ) -> Result<(Logger, LoggerPipes), LoggerError> {
        let fail = |source| LoggerError::Start { path: self.path.clone(), source };
        let pair = || pipe2(OFlag::O_CLOEXEC);
        let make = || -> Result<_, Errno> { Ok((pair()?, pair()?, pair()?, pair()?)) };
        let (output, errors, ready, words) = make().map_err(|errno| fail(errno.into()))?;
        let theirs = [&output.0, &errors.0, &ready.1];
        let pid = self.spawn(origin, theirs, &words.1).map_err(|errno| fail(errno.into()))?;
        let logger = Logger::follow(self, pid, words.0, origin.log).map_err(fail)?;
        drop((output.0, errors.0, ready.1, words.1));
        let mut ready = pipe::Receiver::from_owned_fd(ready.0).map_err(fail)?;
        let said = timeout(limit, tokio::io::AsyncReadExt::read(&mut ready, &mut [0])).await;
        let said = said.map_err(|_| logger.late(limit))?.map_err(fail)?;
        if said == 0
            && let Ok(how) = timeout(FAILURE, logger.exited()).await
            && !how.is_empty()
        {
            return Err(logger.failed(how));
        }
        let sender = |pipe: OwnedFd| pipe::Sender::from_owned_fd(pipe).map_err(fail);
        Ok((logger, [sender(output.1)?, sender(errors.1)?]))
    }

    /// Spawns it with nothing open but its own: everything of the shim's closes on execution.
    fn spawn(
        &self,
        origin: Origin<'_>,
        descriptors: [&OwnedFd; 3],
        words: &OwnedFd,
    ) -> Result<Pid, Errno> {
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Errno::EINVAL);
        let mut arguments = vec![text(self.path.clone().into_os_string().into_vec())?];
        for argument in &self.arguments {
            arguments.push(text(argument.clone().into_bytes())?);
        }
        let environment = [
            text(format!("CONTAINER_ID={}", origin.id).into_bytes())?,
            text(format!("CONTAINER_NAMESPACE={}", origin.namespace).into_bytes())?,
        ];
        let copies: Result<Vec<_>, _> = [words].into_iter().chain(descriptors).map(above).collect();
        let copies = copies?;
        origin.mounts.within(|| {
            // A bundle is there, or the folder is the root.
            let _ = chdir(origin.bundle);
            close_on_execution()?;
            execute(&self.path, &arguments, &environment, &copies)
        })
    }
}

/// Executes `program` in a process group of its own, with `descriptors` from standard error on.
fn execute(
    program: &Path,
    arguments: &[CString],
    environment: &[CString],
    descriptors: &[OwnedFd],
) -> Result<Pid, Errno> {
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_open(0, c"/dev/null", OFlag::O_RDONLY, Mode::empty())?;
    actions.add_open(1, c"/dev/null", OFlag::O_WRONLY, Mode::empty())?;
    for (number, descriptor) in (2..).zip(descriptors) {
        actions.add_dup2(descriptor.as_raw_fd(), number)?;
    }
    let mut default = SigSet::empty();
    default.add(Signal::SIGPIPE);
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_sigdefault(&default)?;
    attributes.set_pgroup(Pid::from_raw(0))?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
            | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
    )?;
    posix_spawn(program, &actions, &attributes, arguments, environment)
}

/// Has every descriptor of the calling thread, which gets a table of its own, close when it executes
/// something: also those that the shim inherited.
fn close_on_execution() -> Result<(), Errno> {
    let flags = libc::CLOSE_RANGE_UNSHARE | libc::CLOSE_RANGE_CLOEXEC;
    // The C library takes the flags as a signed number; they are 6.
    let flags = libc::c_int::try_from(flags).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the call closes nothing now, and changes no table but this thread's own.
    Errno::result(unsafe { libc::close_range(0, libc::c_uint::MAX, flags) }).map(drop)
}

/// Copies a descriptor to a number that is no child's.
fn above(descriptor: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(descriptor, ABOVE)
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}

impl Logger {
    fn follow(
        program: &LoggerProgram,
        pid: Pid,
        words: OwnedFd,
        log: &slog::Logger,
    ) -> io::Result<Self> {
        let pidfd = PidFd::open(pid).and_then(watched_fd).inspect_err(|_| {
            let _ = killpg(pid, Signal::SIGKILL);
        })?;
        let pidfd = Arc::new(pidfd);
        let (sender, ended) = watch::channel(None);
        let logger = Self {
            path: program.path.clone(),
            pid,
            pidfd: Arc::clone(&pidfd),
            words: Arc::default(),
            ended,
            ending: Arc::default(),
            log: log.clone(),
        };
        let words = pipe::Receiver::from_owned_fd(words)?;
        tokio::spawn(collect(words, Arc::clone(&logger.words)));
        let (path, kept) = (logger.path.clone(), Arc::clone(&logger.words));
        let (ending, log) = (Arc::clone(&logger.ending), log.clone());
        tokio::spawn(async move {
            let how = reaped(&pidfd).await;
            if !ending.load(Ordering::Relaxed) {
                warn!(log, "a logger ended before its container"; "program" => path.display(),
                    "how" => if how.is_empty() { "with status 0" } else { &how },
                    "words" => last_words(&kept));
            }
            sender.send_replace(Some(how));
        });
        Ok(logger)
    }

    /// Waits for its end; returns how it ended, empty for success.
    async fn exited(&self) -> String {
        let mut ended = self.ended.clone();
        let how = ended.wait_for(Option::is_some).await.map(|how| how.clone());
        how.ok().flatten().unwrap_or_default()
    }

    fn late(&self, limit: Duration) -> LoggerError {
        self.ending.store(true, Ordering::Relaxed);
        let (path, seconds) = (self.path.clone(), limit.as_secs());
        LoggerError::Late { path, seconds, words: last_words(&self.words) }
    }

    fn failed(&self, how: String) -> LoggerError {
        LoggerError::Ended { path: self.path.clone(), how, words: last_words(&self.words) }
    }

    /// Ends the logger, whose streams have been closed: by itself, or else by signals.
    pub(super) async fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        for (limit, signal) in [(DRAIN, Signal::SIGTERM), (TERMINATE, Signal::SIGKILL)] {
            if timeout(limit, self.exited()).await.is_ok() {
                return;
            }
            if signal == Signal::SIGKILL {
                warn!(self.log, "a logger did not end, and is killed";
                    "program" => self.path.display());
                break;
            }
            let _ = self.pidfd.get_ref().signal(signal);
        }
        self.kill();
        let _ = timeout(KILLED, self.exited()).await;
    }

    /// Kills it with all that it has started, unless it has ended.
    fn kill(&self) {
        // One that has not been waited for still has its number, and its group with it.
        if self.ended.borrow().is_none() {
            let _ = killpg(self.pid, Signal::SIGKILL);
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.kill();
    }
}

/// Waits for a child's end and collects it; returns how it ended, empty for success.
async fn reaped(pidfd: &AsyncFd<PidFd>) -> String {
    loop {
        let Ok(mut ready) = pidfd.readable().await else {
            return "unseen".to_owned();
        };
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        return match waitid(Id::PIDFd(pidfd.get_ref().as_fd()), flags) {
            Ok(WaitStatus::StillAlive) => {
                ready.clear_ready();
                continue;
            }
            Ok(WaitStatus::Exited(_, 0)) => String::new(),
            Ok(WaitStatus::Exited(_, status)) => format!("with status {status}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("by {signal}"),
            Ok(_) | Err(_) => "in an unknown way".to_owned(),
        };
    }
}

/// Keeps the last bytes of a logger's error output. Nobody but the operator of a failing logger reads them.
async fn collect(errors: pipe::Receiver, words: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = vec![0; LAST_WORDS];
    while errors.readable().await.is_ok() {
        match errors.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let mut words = lock(&words);
                words.extend(&buffer[..length]);
                let excess = words.len().saturating_sub(LAST_WORDS);
                words.drain(..excess);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Returns a colon and the last words, or nothing.
fn last_words(words: &Mutex<VecDeque<u8>>) -> String {
    let bytes: Vec<u8> = lock(words).iter().copied().collect();
    match String::from_utf8_lossy(&bytes).trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn shell(line: &str) -> LoggerProgram {
        let arguments = vec!["-c".to_owned(), line.to_owned()];
        LoggerProgram { path: "/bin/sh".into(), arguments }
    }

    async fn start(
        line: &str,
        bundle: &Path,
        limit: Duration,
    ) -> Result<(Logger, LoggerPipes), LoggerError> {
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let mounts = HostMounts::default();
        let origin = Origin { namespace: "ns", id: "c", bundle, mounts: &mounts, log: &log };
        shell(line).start_within(origin, limit).await
    }

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn the_uri_is_the_program_and_its_arguments() {
        let program = |text| LoggerProgram::parse(text).unwrap();
        let parsed = program("/usr/bin/a%20b?id=1%2F2&flag&id=3&x=a+b#rest");
        assert_eq!(parsed.path, Path::new("/usr/bin/a b"));
        assert_eq!(parsed.arguments, ["id", "1/2", "flag", "", "x", "a b"]);
        assert_eq!(program("/bin/logger").arguments, Vec::<String>::new());
        assert_eq!(LoggerProgram::parse("logger?x=y"), None);
    }

    #[tokio::test]
    async fn a_logger_has_three_descriptors_and_two_variables_and_drains_them() {
        let folder = tempfile::tempdir().unwrap();
        let line = "echo /proc/self/fd/* >fds; tr '\\0' '\\n' </proc/$$/environ >env; \
            exec 5>&-; cat <&3 >out; cat <&4 >err";
        let (logger, [mut out, mut err]) = start(line, folder.path(), LIMIT).await.unwrap();
        out.write_all(&[b'o'; 100_000]).await.unwrap();
        err.write_all(b"e").await.unwrap();
        drop((out, err));
        logger.end().await;
        let read = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        // Besides what the shell has for its own work.
        let fds = read("fds").replace("/proc/self/fd/", "");
        assert!(fds.split_whitespace().all(|fd| fd.parse::<u32>().unwrap() <= 10), "{fds}");
        assert_eq!(read("env"), "CONTAINER_ID=c\nCONTAINER_NAMESPACE=ns\n");
        assert_eq!((read("out").len(), read("err").as_str()), (100_000, "e"));
        assert!(!Path::new(&format!("/proc/{}", logger.pid)).exists());
    }

    #[tokio::test]
    async fn a_logger_that_fails_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let failed = start("echo no space >&2; exit 3", folder.path(), LIMIT).await.unwrap_err();
        let text = "cannot log by /bin/sh: it ended with status 3 before it was ready: no space";
        assert_eq!(failed.to_string(), text);
        // As with containerd's own shim, one that succeeds at once has nothing to say.
        start("exit 0", folder.path(), LIMIT).await.unwrap();
        let missing = LoggerProgram { path: "/no/such".into(), arguments: Vec::new() };
        let log = slog::Logger::root(slog::Discard, slog::o!());
        let mounts = HostMounts::default();
        let bundle = folder.path();
        let origin = Origin { namespace: "ns", id: "c", bundle, mounts: &mounts, log: &log };
        let error = missing.start(origin).await.unwrap_err();
        let text = crate::chain(&error);
        assert!(text.starts_with("cannot start the logger /no/such: "), "{text}");
    }

    #[tokio::test]
    async fn a_logger_that_is_never_ready_is_ended_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let line = "sleep 1000 & echo $! >child; echo waiting >&2; wait";
        let error = start(line, folder.path(), Duration::from_secs(1)).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("within 1 s") && text.ends_with("waiting"), "{text}");
        let child = std::fs::read_to_string(folder.path().join("child")).unwrap();
        let child = Path::new("/proc").join(child.trim()).join("exe");
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        while std::fs::read_link(&child).is_ok() {
            assert!(std::time::Instant::now() < patience, "{} is left", child.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_logger_that_reads_on_is_told_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let line = "trap 'echo told >told; exit' TERM; exec 5>&-; while :; do sleep 0.1; done";
        let (logger, pipes) = start(line, folder.path(), LIMIT).await.unwrap();
        drop(pipes);
        logger.end().await;
        assert!(folder.path().join("told").exists());
    }
}
