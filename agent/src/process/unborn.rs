//! A process that nobody follows yet.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::init::calls;

/// A process between its making and [`Process::follow`](crate::process::Process::follow); dropping this
/// kills it, so that a failure in between, or a call that is given up, leaves no process.
#[derive(Debug)]
pub struct Unborn(Option<OwnedFd>);

impl Unborn {
    /// The child `pid`. One that has exited already needs no end.
    pub fn new(pid: i32) -> Self {
        Self(Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()))
    }

    /// Lets the process live.
    pub fn live(mut self) {
        self.0 = None;
    }
}

impl Drop for Unborn {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            // Fails only for one that has ended.
            let _ = calls::signal(process.as_fd(), libc::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn only_a_process_that_may_live_lives() {
        let spawn = || Command::new("sleep").arg("60").spawn().expect("a process");
        let (mut killed, mut spared) = (spawn(), spawn());
        let unborn = |child: &std::process::Child| Unborn::new(child.id().cast_signed());
        drop(unborn(&killed));
        assert_eq!(killed.wait().expect("its end").signal(), Some(libc::SIGKILL));
        unborn(&spared).live();
        assert!(spared.try_wait().expect("its state").is_none());
        spared.kill().expect("killed");
        spared.wait().expect("its end");
    }
}
