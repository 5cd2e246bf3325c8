//! A process of `husk-vmm`: spawned with its control socket, watched by descriptor.

use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_control::CONTROL_FD;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, pipe2};
use slog::{Logger, debug, info, warn};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::pidfd::watched_fd;
use super::{MachineError, NetworkNamespace, PidFd};
use crate::apart::apart;
use crate::lock::lock;

/// Bytes of a process's error output kept for the error message.
const TAIL: usize = 2048;

/// Bytes of a process's error output that go to the log; the guest may be what causes them.
const LOGGED: usize = 64 * 1024;

/// How long the error output of an ended process is waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How long a killed process is waited for. One that the kernel holds (a file system of the host's
/// that does not answer) may never end.
const KILLED_END: Duration = Duration::from_secs(10);

/// Milliseconds for which the end of a process that is dropped may hold up its thread.
const DROPPED_END: u16 = 500;

/// What a process of `husk-vmm` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The virtual machine.
    Machine,
    /// The file server.
    Files,
}

impl Role {
    const fn argument(self) -> &'static [u8] {
        match self {
            Self::Machine => b"machine",
            Self::Files => b"files",
        }
    }

    /// As it is called in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Files => "file server",
        }
    }
}

/// The program `husk-vmm`, as the settings have it.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// Walls of its jail that this host may lack.
    pub accept_missing: &'a [String],
}

/// A child process. It ends by itself when its control socket closes; dropping kills it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    role: Role,
    pidfd: AsyncFd<PidFd>,
    tail: Arc<Mutex<VecDeque<u8>>>,
    /// Changes to true when the error output is closed.
    silent: watch::Receiver<bool>,
}

impl Child {
    /// Starts `program` in `role` and returns it with our end of its control socket.
    pub fn spawn(
        program: Program<'_>,
        role: Role,
        network: &NetworkNamespace,
        log: &Logger,
    ) -> Result<(Self, OwnedFd), MachineError> {
        let (ours, theirs) = husk_control::socket_pair().map_err(MachineError::Control)?;
        let fail = |source| MachineError::Spawn { program: program.path.to_path_buf(), source };
        let (errors, errors_in) = pipe2(OFlag::O_CLOEXEC).map_err(fail)?;
        let spawned = apart(|| {
            network.enter()?;
            // What it is taken over by sees no process but its own. `unshare` moves children only.
            unshare(CloneFlags::CLONE_NEWPID)?;
            spawn(program, role, &theirs, &errors_in)
        });
        let pid = spawned.map_err(fail)?;
        drop((theirs, errors_in));
        let watch = |source| MachineError::Watch { program: program.path.to_path_buf(), source };
        let pidfd = PidFd::open(pid).and_then(watched_fd).map_err(watch)?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let errors = pipe::Receiver::from_owned_fd(errors).map_err(watch)?;
        let (closed, silent) = watch::channel(false);
        let collecting = collect(errors, Arc::clone(&tail), role, log.clone());
        tokio::spawn(async move {
            collecting.await;
            closed.send_replace(true);
        });
        debug!(log, "process started"; "role" => role.name(), "pid" => pid.as_raw());
        Ok((Self { pid, role, pidfd, tail, silent }, ours))
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until it has exited, and says how, with what it last wrote to its error output.
    pub async fn exited(&self) -> String {
        loop {
            let Ok(mut ready) = self.pidfd.readable().await else {
                return format!("the {} process cannot be watched", self.role.name());
            };
            let how = match waitid(
                Id::PIDFd(self.pidfd.get_ref().as_fd()),
                WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
            ) {
                Ok(WaitStatus::StillAlive) => {
                    ready.clear_ready();
                    continue;
                }
                Ok(WaitStatus::Exited(_, status)) => format!("with status {status}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("by {signal}"),
                Ok(_) | Err(_) => "in an unknown way".to_owned(),
            };
            // What it wrote last may still be on its way to us; a heir may hold the pipe open.
            let mut silent = self.silent.clone();
            let _ = timeout(LAST_WORDS, silent.wait_for(|closed| *closed)).await;
            let tail = self.last_words();
            let colon = if tail.is_empty() { "" } else { ": " };
            return format!("the {} process ended {how}{colon}{tail}", self.role.name());
        }
    }

    /// Follows the process to its end, which `kill` brings about, and says how that came. A process
    /// that the kernel does not let go of counts as ended: it runs no code of its own any more.
    pub(super) async fn life(self, kill: Arc<Notify>) -> String {
        tokio::select! {
            how = self.exited() => return how,
            () = kill.notified() => self.kill(),
        }
        match timeout(KILLED_END, self.exited()).await {
            Ok(how) => how,
            Err(_) => format!(
                "the {} process {} was killed, but the host's kernel does not let go of it",
                self.role.name(),
                self.pid
            ),
        }
    }

    /// Ends it at once. Nothing happens if it has ended already.
    pub fn kill(&self) {
        // ESRCH is the only way to fail: it has been waited for.
        let _ = self.pidfd.get_ref().signal(Signal::SIGKILL);
    }

    fn last_words(&self) -> String {
        let tail: Vec<u8> = lock(&self.tail).iter().copied().collect();
        let text = String::from_utf8_lossy(&tail);
        // The last lines are what it died of.
        let lines: Vec<_> = text.lines().filter_map(last_word).rev().take(2).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        if reap(self.pidfd.get_ref().as_fd(), DROPPED_END.into()) {
            return;
        }
        // A thread of its own waits for it: the caller's has other processes to look after.
        if let Ok(pidfd) = self.pidfd.get_ref().as_fd().try_clone_to_owned() {
            let _ = std::thread::Builder::new()
                .name("reaper".to_owned())
                .spawn(move || waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED));
        }
    }
}

/// Collects a killed process if it ends within `limit`, which those do that wait for no device or
/// file system.
fn reap(pidfd: BorrowedFd<'_>, limit: PollTimeout) -> bool {
    let mut ended = [PollFd::new(pidfd, PollFlags::POLLIN)];
    // Interrupted: as if the time were up.
    let _ = poll(&mut ended, limit);
    let waited = waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
    !matches!(waited, Ok(WaitStatus::StillAlive))
}

/// A line of the log that `husk-vmm` writes to its error output.
#[derive(Debug, serde::Deserialize)]
struct LogLine {
    msg: String,
    level: String,
    #[serde(default)]
    error: String,
}

impl LogLine {
    fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }

    fn text(&self) -> String {
        let colon = if self.error.is_empty() { "" } else { ": " };
        format!("{}{colon}{}", self.msg, self.error)
    }
}

/// What a line says of the end; nothing if it is only news.
fn last_word(line: &str) -> Option<String> {
    match LogLine::parse(line) {
        Some(line) if matches!(line.level.as_str(), "INFO" | "DEBG" | "TRCE") => None,
        Some(line) => Some(line.text()),
        None => Some(line.trim().to_owned()).filter(|line| !line.is_empty()),
    }
}

/// A line of the process's log in ours, as important as it was there.
fn relay(line: &str, role: Role, log: &Logger) {
    let role = role.name();
    match LogLine::parse(line) {
        None => info!(log, "{role}: {line}"),
        Some(line) => match line.level.as_str() {
            "CRIT" | "ERRO" | "WARN" => warn!(log, "{role}: {}", line.text()),
            "INFO" => info!(log, "{role}: {}", line.text()),
            _ => debug!(log, "{role}: {}", line.text()),
        },
    }
}

/// `posix_spawn` shares our memory until the exec: no page tables are copied.
fn spawn(
    program: Program<'_>,
    role: Role,
    control: &OwnedFd,
    errors: &OwnedFd,
) -> Result<Pid, Errno> {
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_open(0, c"/dev/null", OFlag::O_RDONLY, Mode::empty())?;
    actions.add_open(1, c"/dev/null", OFlag::O_WRONLY, Mode::empty())?;
    // In this order: `errors` may be descriptor 3 here. Same numbers lose close-on-exec.
    actions.add_dup2(errors.as_raw_fd(), 2)?;
    actions.add_dup2(control.as_raw_fd(), CONTROL_FD)?;
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&SigSet::empty())?;
    let mut default = SigSet::empty();
    default.add(Signal::SIGPIPE);
    attributes.set_sigdefault(&default)?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF,
    )?;
    let mut arguments = vec![program.path.as_os_str().as_bytes(), role.argument()];
    for wall in program.accept_missing {
        arguments.extend([b"--accept-missing", wall.as_bytes()]);
    }
    let arguments = arguments.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let arguments = arguments.map_err(|_| Errno::EINVAL)?;
    posix_spawn(program.path, &actions, &attributes, &arguments, &[] as &[&std::ffi::CStr])
}

/// Keeps the tail of the error output and logs its lines, up to a limit.
async fn collect(errors: pipe::Receiver, tail: Arc<Mutex<VecDeque<u8>>>, role: Role, log: Logger) {
    let mut budget = LOGGED;
    let mut buffer = vec![0; TAIL];
    let mut line = Vec::new();
    while errors.readable().await.is_ok() {
        let length = match errors.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        {
            let mut tail = lock(&tail);
            tail.extend(&buffer[..length]);
            let excess = tail.len().saturating_sub(TAIL);
            tail.drain(..excess);
        }
        // A line comes in pieces, as its writer pleases.
        for byte in &buffer[..length] {
            if *byte == b'\n' || line.len() == TAIL {
                if let Some(left) = budget.checked_sub(line.len()) {
                    budget = left;
                    relay(&String::from_utf8_lossy(&line), role, &log);
                }
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn start(path: &str, role: Role) -> Result<(Child, OwnedFd), MachineError> {
        let program = Program { path: Path::new(path), accept_missing: &[] };
        Child::spawn(program, role, &NetworkNamespace::Inherited, &log())
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = start("/nowhere/husk-vmm", Role::Machine);
        assert_eq!(error.unwrap_err().to_string(), "cannot start /nowhere/husk-vmm");
    }

    #[tokio::test]
    async fn says_how_it_ended() {
        let (child, _control) = start("/bin/ls", Role::Files).unwrap();
        let how = child.exited().await;
        assert!(how.contains("the file server process ended with status 2: "), "{how}");
        assert!(how.contains("files"), "{how}");
    }

    #[test]
    fn only_what_went_wrong_is_a_last_word() {
        let line = |level| format!(r#"{{"msg":"a","level":"{level}","error":"b","pid":1}}"#);
        assert_eq!(last_word(&line("INFO")), None);
        assert_eq!(last_word(&line("ERRO")).unwrap(), "a: b");
        assert_eq!(last_word("thread panicked ").unwrap(), "thread panicked");
        assert_eq!(last_word(" "), None);
    }

    fn script(text: &str) -> (Child, OwnedFd, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("script");
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        let (child, control) = start(program.to_str().unwrap(), Role::Machine).unwrap();
        // The shell has yet to open it.
        (child, control, folder)
    }

    #[tokio::test]
    async fn sees_no_process_but_itself() {
        let (child, _control, _folder) = script("echo this is $$ >&2; kill -0 2; exit 3");
        let how = child.exited().await;
        assert!(how.contains("with status 3: this is 1; "), "{how}");
        assert!(how.contains("No such process"), "{how}");
    }

    #[tokio::test]
    async fn can_be_killed() {
        let (child, _control, _folder) = script("exec sleep 1000");
        child.kill();
        assert_eq!(child.exited().await, "the machine process ended by SIGKILL");
    }
}
