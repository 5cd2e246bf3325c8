//! A vCPU's thread: its commands and its states.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use husk_control::EndReason;
use kvm_ioctls::VcpuFd;

use super::Shared;
use super::exit::{self, Next};
use super::kick::Kickable;
use super::state::{StateError, VcpuState};
use crate::machine::chain;
use crate::seccomp;

/// What a vCPU is told.
pub(super) enum Command {
    /// Run the guest.
    Run,
    /// Stop where it is.
    Pause,
    /// Hand out the state; only when not Running.
    Save(Vec<u32>),
    /// Take a state; only when not Running.
    Restore(Box<VcpuState>),
    /// Let the thread return.
    Stop,
}

/// What it answers.
pub(super) enum Answer {
    /// Done.
    Done,
    /// Its state.
    Saved(Result<Box<VcpuState>, StateError>),
    /// Whether it took the state.
    Restored(Result<(), StateError>),
    /// Not while Running.
    Busy,
}

enum State {
    Paused,
    Running,
    Ended,
    Stopped,
}

pub(super) struct VcpuThread {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Receiver<Command>,
    pub(super) answers: Sender<Answer>,
}

impl VcpuThread {
    /// The thread's body.
    pub(super) fn run(self, fd: VcpuFd) {
        if let Err(error) = seccomp::narrow(seccomp::Thread::Vcpu) {
            let error = chain(error);
            return self.shared.end.end(EndReason::Failed { error });
        }
        let mut vcpu = Kickable::new(fd);
        let mut state = State::Paused;
        loop {
            state = match state {
                State::Running => match exit::run(vcpu.fd(), &self.shared) {
                    Next::Run => State::Running,
                    Next::End => State::Ended,
                    Next::Look => match self.commands.try_recv() {
                        Ok(command) => self.obey(vcpu.fd(), State::Running, command),
                        Err(TryRecvError::Empty) => State::Running,
                        Err(TryRecvError::Disconnected) => State::Stopped,
                    },
                },
                waiting @ (State::Paused | State::Ended) => match self.commands.recv() {
                    Ok(command) => self.obey(vcpu.fd(), waiting, command),
                    Err(_) => State::Stopped,
                },
                State::Stopped => return,
            };
        }
    }

    fn obey(&self, fd: &mut VcpuFd, state: State, command: Command) -> State {
        let running = matches!(state, State::Running);
        let (next, answer) = match command {
            Command::Stop => return State::Stopped,
            Command::Run if matches!(state, State::Ended) => (State::Ended, Answer::Done),
            Command::Run => (State::Running, Answer::Done),
            Command::Pause if running => {
                complete(fd);
                exit::take_put_off(fd, &self.shared);
                (State::Paused, Answer::Done)
            }
            Command::Pause => (state, Answer::Done),
            Command::Save(_) | Command::Restore(_) if running => (state, Answer::Busy),
            Command::Save(msrs) => (state, Answer::Saved(VcpuState::save(fd, &msrs).map(Box::new))),
            Command::Restore(saved) => (state, Answer::Restored(saved.restore(fd))),
        };
        // Nobody left to hear it: the channel of commands tells the same in the next round.
        let _ = self.answers.send(answer);
        next
    }
}

/// An access whose answer the guest has not taken yet would be lost with the state: one entry that
/// returns at once lets KVM finish it.
fn complete(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(1);
    // It returns with EINTR before the next instruction.
    let _ = fd.run();
    fd.set_kvm_immediate_exit(0);
}
