//! Starting a monitor and waiting for its end, at the price of the system calls.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Starts `program` with the given descriptors at the given numbers.
pub fn start(
    program: &Path,
    arguments: &[String],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
) -> Result<Pid> {
    let path = CString::new(program.as_os_str().as_bytes())?;
    let mut words = vec![path.clone()];
    for argument in arguments {
        words.push(CString::new(argument.as_str())?);
    }
    let mut actions = PosixSpawnFileActions::init()?;
    for (descriptor, number) in descriptors {
        actions.add_dup2(descriptor.as_raw_fd(), *number)?;
    }
    let environment: [CString; 1] = [c"PATH=/usr/bin:/bin".to_owned()];
    posix_spawn(path.as_c_str(), &actions, &PosixSpawnAttr::init()?, &words, &environment)
        .with_context(|| format!("{} does not start", program.display()))
}

/// Waits for the end of the process, which must be an orderly one.
pub fn wait(process: Pid) -> Result<()> {
    match waitpid(process, None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        status => bail!("the monitor ended with {status:?}"),
    }
}
