//! A vCPU as the machine holds it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use super::thread::{Answer, Command, VcpuThread};
use super::{Shared, VcpuError, VcpuState, kick};

/// Enough for the bus, a device and a log line.
const STACK_SIZE: usize = 256 * 1024;

/// A vCPU and its thread, which ends with the handle.
pub struct VcpuHandle {
    commands: Sender<Command>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts a thread for the vCPU; it waits for [`VcpuHandle::begin_run`].
    pub fn start(fd: VcpuFd, number: u8, shared: Arc<Shared>) -> Result<Self, VcpuError> {
        kick::install().map_err(VcpuError::Thread)?;
        let (commands, receiver) = channel();
        let (sender, answers) = channel();
        let body = VcpuThread { shared, commands: receiver, answers: sender };
        let thread = Builder::new()
            .name(format!("vcpu{number}"))
            .stack_size(STACK_SIZE)
            .spawn(move || body.run(fd))
            .map_err(VcpuError::Thread)?;
        Ok(Self { commands, answers, thread: Some(thread) })
    }

    /// Tells a vCPU that is paused, or has ended, to run; [`VcpuHandle::finish`] waits until it has
    /// heard. One that runs would not hear it.
    pub fn begin_run(&self) -> Result<(), VcpuError> {
        self.commands.send(Command::Run).map_err(|_| VcpuError::Gone)
    }

    /// Tells the vCPU to stop where it is; [`VcpuHandle::finish`] waits until it has.
    pub fn begin_pause(&self) -> Result<(), VcpuError> {
        self.command(Command::Pause)
    }

    /// Waits for the answer to `begin_run` or `begin_pause`.
    pub fn finish(&self) -> Result<(), VcpuError> {
        self.answer().map(|_| ())
    }

    /// The state of a paused vCPU; `msrs` are the MSRs that belong to it.
    pub fn save(&self, msrs: &[u32]) -> Result<Box<VcpuState>, VcpuError> {
        self.command(Command::Save(msrs.to_vec()))?;
        match self.answer()? {
            Answer::Saved(result) => Ok(result?),
            _ => Err(VcpuError::State(super::StateError::Running)),
        }
    }

    /// Gives a paused vCPU a state.
    pub fn restore(&self, state: Box<VcpuState>) -> Result<(), VcpuError> {
        self.command(Command::Restore(state))?;
        match self.answer()? {
            Answer::Restored(result) => Ok(result?),
            _ => Err(VcpuError::State(super::StateError::Running)),
        }
    }

    fn command(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone)?;
        self.kick().map_err(VcpuError::Thread)
    }

    fn answer(&self) -> Result<Answer, VcpuError> {
        self.answers.recv().map_err(|_| VcpuError::Gone)
    }

    fn kick(&self) -> io::Result<()> {
        match &self.thread {
            Some(thread) => Ok(thread.kill(kick::signal())?),
            None => Ok(()),
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        // Fails only if the thread has returned already.
        let _ = self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
