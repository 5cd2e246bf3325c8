//! The agent's side of a helper.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::container::error::{ContainerError, Tried};
use crate::container::helper::report::{GO, Message};
use crate::init::calls;
use crate::process::{Stdio, Unborn};

/// Larger than the largest report, whose every byte may be escaped in JSON.
const PACKET: usize = 32 << 10;

/// How long the making of a process may take: it waits for the file systems of its container. Shorter than the
/// host waits for the answer.
pub const MAKE_LIMIT: Duration = Duration::from_secs(40);

/// A helper at work. One that is dropped before it has told of a process is killed.
#[derive(Debug)]
pub struct Helper {
    reports: AsyncFd<OwnedFd>,
    /// The helper itself, until it has told.
    process: Option<Unborn>,
}

impl Helper {
    /// Executes the helper for `role` on the request in `directory`. The reaper collects it.
    pub fn spawn(role: &str, directory: &Path, stdio: Stdio) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let reports = calls::watch(ours, Interest::READABLE)?;
        // No other spawn can come in between: the agent has one thread and this does not wait.
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let child = Command::new("/proc/self/exe")
            .args(["container", role])
            .arg(directory)
            .arg(theirs.as_raw_fd().to_string())
            .env_clear()
            .current_dir("/")
            .stdin(stdio.input)
            .stdout(stdio.output)
            .stderr(stdio.error)
            .spawn()?;
        Ok(Self { reports, process: Some(Unborn::new(child.id().cast_signed())) })
    }

    /// The next report; none when all who could report have gone or executed their command.
    async fn message(&self) -> io::Result<Option<Message>> {
        let mut packet = vec![0u8; PACKET];
        loop {
            let mut ready = self.reports.readable().await?;
            match recv(self.reports.get_ref().as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(None),
                Ok(length) => return Ok(Some(serde_json::from_slice(&packet[..length])?)),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The process that the helper has made, within [`MAKE_LIMIT`].
    pub async fn pid(&mut self) -> Result<i32, ContainerError> {
        let message = tokio::time::timeout(MAKE_LIMIT, self.message()).await;
        let message = message.map_err(|_| ContainerError::late(MAKE_LIMIT))?;
        match message.tried("hear the helper")? {
            Some(Message::Pid(pid)) if pid > 0 => {
                // The helper may be that process.
                if let Some(process) = self.process.take() {
                    process.live();
                }
                Ok(pid)
            }
            Some(message) => Err(refusal(message)),
            None => Err(ContainerError::Helper("the helper ended without an answer".to_owned())),
        }
    }

    /// Lets an exec'd process go on, which waits before it executes its command. One that has ended by
    /// itself tells why in [`Helper::executed`].
    pub fn go(&self) {
        let _ = send(self.reports.get_ref().as_raw_fd(), &GO, MsgFlags::MSG_NOSIGNAL);
    }

    /// Waits until the process has executed its command.
    pub async fn executed(&self) -> Result<(), ContainerError> {
        match self.message().await.tried("hear the process")? {
            None => Ok(()),
            Some(message) => Err(refusal(message)),
        }
    }
}

fn refusal(message: Message) -> ContainerError {
    match message {
        Message::Failed(failure) if failure.command => ContainerError::Command(failure.text),
        Message::Failed(failure) => ContainerError::Helper(failure.text),
        Message::Pid(pid) => ContainerError::Helper(format!("the helper speaks of process {pid}")),
    }
}
