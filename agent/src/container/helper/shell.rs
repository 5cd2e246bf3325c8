//! `container shell`: becomes a program of the host's in the guest itself.
//!
//! Unlike the other roles this one makes no further process: it is in the right namespaces already.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libcontainer::syscall::syscall::create_syscall;
use nix::unistd::{execve, setsid};

use crate::container::helper::ShellRequest;
use crate::container::helper::console::Sender;
use crate::container::helper::lookup;
use crate::container::helper::report::{Because, Failure, Report};
use crate::container::helper::terminal;
use crate::init::calls;

/// Becomes the program that the request in `directory` names; comes back only if that fails.
pub fn run(directory: &Path, report: &Report) -> Failure {
    match become_program(directory, report) {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn become_program(directory: &Path, report: &Report) -> Result<std::convert::Infallible, Failure> {
    let request = fs::read(directory.join("shell.json")).because("read the request")?;
    let request: ShellRequest = serde_json::from_slice(&request).because("read the request")?;
    fs::write(request.cgroup.join("cgroup.procs"), "0").because("enter the cgroup")?;
    report.pid(nix::unistd::getpid().as_raw());
    setsid().because("begin a session")?;
    if let Some(console) = request.console.as_deref() {
        let console = Sender::connect(console).because("terminal")?;
        terminal::open((request.rows, request.columns), &console).because("terminal")?;
    }
    // A program that nobody hears is not executed.
    report.await_go()?;
    // From here on every descriptor but the standard streams closes when the program is executed.
    create_syscall().close_range(0).because("close descriptors")?;
    let program = terminated(request.program.as_os_str().as_bytes())?;
    let all = |texts: &[String]| -> Result<Vec<CString>, Failure> {
        texts.iter().map(|text| terminated(text.as_bytes())).collect()
    };
    let (arguments, environment) = (all(&request.arguments)?, all(&request.environment)?);
    calls::default_signals();
    execve(&program, &arguments, &environment).map_err(|error| {
        let reason = lookup::say(&io::Error::from(error));
        Failure::command(format!("exec of the program from the host: {reason}"))
    })
}

fn terminated(bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure::other("NUL in the command or its environment"))
}
