//! The helper: the agent's own binary, executed to make one process and end.
//!
//! Its standard streams are the process's already. It reads its request from a file in a directory
//! and reports on a packet socket: the process id, or why there is none. The process inherits that
//! socket until it executes its command, so that its own failures are told the same way.

mod causes;
mod command;
mod console;
mod create;
mod exec;
pub mod lookup;
mod pids;
mod priority;
mod report;
mod shell;
mod spawn;
mod terminal;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sys::resource::{Resource, setrlimit};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use crate::container::validity::Validity;
use crate::init::calls;

pub use console::Console;
pub use spawn::{Helper, MAKE_LIMIT};

/// What `create` is asked for, beside `config.json` in the same directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The container.
    pub id: String,
    /// The command's environment.
    pub environment: Vec<String>,
    /// A directory to make and enter inside the container.
    pub directory: Option<PathBuf>,
    /// A directory to make below another one in the guest.
    pub early_directory: Option<(PathBuf, PathBuf)>,
    /// The socket that the terminal is sent to.
    pub console: Option<PathBuf>,
    /// Whether the container's network namespace is new.
    pub loopback: bool,
}

/// What `exec` is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The process to be.
    pub process: Process,
    /// The container's init.
    pub init: u32,
    /// That of the share.
    pub validity: Validity,
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The container's cgroup.
    pub cgroup: PathBuf,
    /// The socket that the terminal is sent to.
    pub console: Option<PathBuf>,
    /// The terminal's size in characters, or 0.
    pub rows: u16,
    /// See `rows`.
    pub columns: u16,
}

/// What `shell` is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct ShellRequest {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments, its name the first.
    pub arguments: Vec<String>,
    /// Its environment.
    pub environment: Vec<String>,
    /// The shell's cgroup.
    pub cgroup: PathBuf,
    /// The socket that the terminal is sent to.
    pub console: Option<PathBuf>,
    /// The terminal's size in characters, or 0.
    pub rows: u16,
    /// See `rows`.
    pub columns: u16,
}

/// The helper's main.
pub fn run(role: &str, directory: &Path, descriptor: &str) -> ExitCode {
    let number = descriptor.parse().unwrap_or(-1);
    let Ok(socket) = calls::inherited(number) else {
        eprintln!("husk-agent: the helper's role is the agent's to call");
        return ExitCode::from(2);
    };
    let report = report::Report::new(socket);
    // The limits of a process that asks for none, instead of the agent's.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1024, 1 << 20);
    let result = match role {
        "create" => create::run(directory, &report).map(|pid| report.pid(pid)),
        "exec" => exec::run(directory, &report).map(|pid| report.pid(pid)),
        "shell" => Err(shell::run(directory, &report)),
        "pids" => pids::run().map(|pid| report.pid(pid)),
        _ => Err(report::Failure::other("no such role")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report.failed(&failure);
            ExitCode::FAILURE
        }
    }
}
