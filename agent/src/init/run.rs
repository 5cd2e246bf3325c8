//! The two ways the agent comes up: as a guest's init, and beside a component test.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use husk_agent_protocols::AGENT_PORT;
use nix::sys::resource::{Resource, setrlimit};
use slog::{Logger, crit, info};

use crate::host::{Address, Host};
use crate::init::reaper::Reaper;
use crate::init::{log, mounts, power};
use crate::rpc;
use crate::sandbox::Sandbox;

/// The kernel's own upper limit for a process.
const DESCRIPTORS: u64 = 1 << 20;

/// The guest's init. Does not come back: the machine is reset at the end.
pub fn guest() -> ExitCode {
    // The handshake of the connection goes on while the mounts are made.
    let dialled = Host::Vsock.dial(Address::open(AGENT_PORT));
    let mounted = mounts::enter_root();
    let log = log::logger();
    let result = mounted.map_err(io::Error::other).and_then(|()| serve(&log, Host::Vsock, dialled));
    if let Err(error) = result {
        crit!(log, "agent: ends"; "error" => %error);
    }
    power::reset(&log)
}

/// The agent beside a component test: PID 1 of a PID namespace, in a mount namespace of its own.
pub fn component(directory: PathBuf) -> ExitCode {
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let host = Host::Directory(directory);
    let log = log::stderr();
    let dialled = host.dial(Address::open(AGENT_PORT));
    let result = mounts::component_root(&name).map_err(io::Error::other).and_then(|outside| {
        serve(&log, host, dialled)?;
        mounts::component_leave(&outside, &name).map_err(io::Error::other)
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crit!(log, "agent: ends"; "error" => %error);
            ExitCode::FAILURE
        }
    }
}

/// Serves the host until it hangs up or asks for the end.
fn serve(log: &Logger, host: Host, dialled: io::Result<std::os::fd::OwnedFd>) -> io::Result<()> {
    // Streams take descriptors; what containers get is set by their helper. Beside a component
    // test the machine may refuse, and its limit is enough.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let reaper = Reaper::start(log)?;
        let connection = rpc::connect(&host, dialled).await?;
        info!(log, "agent: host connected");
        let sandbox = Sandbox::new(log.clone(), host, reaper);
        rpc::serve(connection, sandbox.clone()).await?;
        sandbox.end().await;
        Ok(())
    })
}
