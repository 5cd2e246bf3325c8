//! The agent: PID 1 of the guest. It makes the guest a place where containers can run, dials the
//! host, and serves [`husk_agent_protocols`] on that one connection.
//!
//! Roles, by the first arguments:
//! - none: the guest's init;
//! - `container create|exec|pids DIRECTORY DESCRIPTOR`: the short-lived helper that makes one process;
//!   the agent executes itself so, because what happens there (namespaces, changed working
//!   directory, dropped privileges) must not happen to PID 1;
//! - `component DIRECTORY`: as init, but on a machine that is not ours: no guest mounts, no reset,
//!   and the host's ports are UNIX sockets in DIRECTORY. The component tests use it.

mod apart;
mod container;
mod host;
mod init;
mod machine;
mod network;
mod process;
pub mod requests;
mod rpc;
mod sandbox;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Takes the role that the program's arguments name, to its end.
pub fn run() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let texts: Vec<&str> = arguments.iter().filter_map(|a| a.to_str()).collect();
    match texts.as_slice() {
        ["container", role, directory, descriptor] => {
            container::helper::run(role, &PathBuf::from(directory), descriptor)
        }
        ["component", directory] => init::component(PathBuf::from(directory)),
        // The kernel hands on the words of its command line that it does not know.
        _ if std::process::id() == 1 => init::guest(),
        _ => {
            eprintln!("husk-agent: this is the init of Husk's guests; it does nothing here");
            ExitCode::from(2)
        }
    }
}
