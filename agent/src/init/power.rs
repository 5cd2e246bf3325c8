//! The end of the machine.

use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::time::Duration;

use husk_agent_protocols::SHARE_PATH;
use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use slog::{Logger, crit};

use crate::init::calls;

/// How long the last answer may take to leave the guest.
const LAST_ANSWER: Duration = Duration::from_millis(20);

/// Waits until what was written to `socket` has left the guest, at most [`LAST_ANSWER`].
pub async fn flush(socket: BorrowedFd<'_>) {
    let step = Duration::from_micros(250);
    let mut waited = Duration::ZERO;
    while waited < LAST_ANSWER && matches!(calls::unsent(socket), Ok(bytes) if bytes > 0) {
        tokio::time::sleep(step).await;
        waited += step;
    }
}

/// Writes everything back and resets the machine, which its monitor takes as the end.
pub fn reset(log: &Logger) -> ExitCode {
    // The share is not there if the sandbox never started.
    let _ = umount2(SHARE_PATH, MntFlags::MNT_DETACH);
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    crit!(log, "power: no reset"; "error" => %error);
    // PID 1 ends: the kernel panics, which the monitor sees too.
    ExitCode::FAILURE
}
