//! What the helper, and the process it makes, tell the agent.

use std::error::Error;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use serde::{Deserialize, Serialize};

/// Longer texts are cut: they go to the host.
const TEXT_LIMIT: usize = 4096;

/// The agent's packet to a process that waits before it executes its command.
pub const GO: [u8; 1] = [1];

/// One packet.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The process as the guest sees it.
    Pid(i32),
    /// There is none.
    Failed(Failure),
}

/// Why there is no process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whether it is the command that cannot be executed.
    pub command: bool,
    /// The reason.
    pub text: String,
}

impl Failure {
    /// A failure that is not the command's.
    pub fn other(text: impl Into<String>) -> Self {
        Self { command: false, text: text.into() }
    }

    /// The command cannot be executed.
    pub fn command(text: impl Into<String>) -> Self {
        Self { command: true, text: text.into() }
    }

    /// `what` failed because of `error` and all that is behind it.
    pub fn because(what: &str, error: &dyn Error) -> Self {
        let mut text = format!("{what}: {error}");
        let mut source = error.source();
        while let Some(error) = source {
            let reason = error.to_string();
            // Some of libcontainer's errors repeat what is behind them.
            if !text.ends_with(&reason) {
                text = format!("{text}: {reason}");
            }
            source = error.source();
        }
        Self::other(text)
    }
}

/// Names what was tried when it fails.
pub trait Because<T> {
    /// The failure of `what`.
    fn because(self, what: &str) -> Result<T, Failure>;
}

impl<T, E: Error> Because<T> for Result<T, E> {
    fn because(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::because(what, &error))
    }
}

/// The way to the agent.
#[derive(Debug, Clone)]
pub struct Report(Rc<OwnedFd>);

impl Report {
    /// Reports on `socket`.
    pub fn new(socket: OwnedFd) -> Self {
        Self(Rc::new(socket))
    }

    /// There is a process.
    pub fn pid(&self, pid: i32) {
        self.send(&Message::Pid(pid));
    }

    /// There is none.
    pub fn failed(&self, failure: &Failure) {
        let mut failure = failure.clone();
        failure.text.truncate(failure.text.floor_char_boundary(TEXT_LIMIT));
        self.send(&Message::Failed(failure));
    }

    /// Waits until the agent says [`GO`]; an error if it gives the process up instead.
    pub fn await_go(&self) -> Result<(), Failure> {
        let mut go = [0; 1];
        loop {
            match recv(self.0.as_raw_fd(), &mut go, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Ok(1) if go == GO => return Ok(()),
                Ok(_) => return Err(Failure::other("the process was given up")),
                Err(error) => return Err(Failure::because("await the agent", &error)),
            }
        }
    }

    fn send(&self, message: &Message) {
        // These types always serialise; and an agent that has gone has nobody to tell.
        let packet = serde_json::to_vec(message).unwrap_or_default();
        let _ = send(self.0.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL);
    }
}
