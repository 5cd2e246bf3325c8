//! `husk-vmm`: a machine or a file server, as its first argument says.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Mutex;

use clap::{Parser, Subcommand};
use husk_control::CONTROL_FD;
use husk_vmm::launcher::BootOptions;
use husk_vmm::{files, jail, launcher, machine, probe, seccomp};
use slog::{Drain, Level, Logger, error, o};

/// Whether neither role has walls round it: only in what `tests/bench` builds to measure them.
const UNJAILED: bool = cfg!(feature = "unjailed");

/// Husk's virtual machine monitor
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Least level of what is logged to standard error: error, warning, info, debug or trace
    #[arg(long, global = true, default_value = "info", value_parser = level)]
    log_level: Level,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Run one guest, driven over the control socket (descriptor 3)
    Machine(Walls),
    /// Serve one folder to a machine, driven over the control socket (descriptor 3)
    Files(Walls),
    /// Try which walls this host can put round a machine
    Walls(Walls),
    /// Print which system calls each kind of thread may make, with which arguments, and what for
    Filters,
    /// Try whether this host's KVM really runs guests
    Probe,
    /// Boot a guest without a shim, for developers and benchmarks
    Boot(BootOptions),
}

#[derive(Debug, clap::Args)]
struct Walls {
    /// A wall of the jail that this host may lack
    #[arg(long, value_name = "WALL")]
    accept_missing: Vec<jail::Wall>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let logger = logger(arguments.log_level);
    let result = match &arguments.role {
        Role::Machine(_) if UNJAILED => control().and_then(|fd| Ok(machine::run(fd, &logger)?)),
        Role::Files(_) if UNJAILED => control().and_then(|fd| Ok(files::run(fd, &logger)?)),
        Role::Machine(walls) => control().and_then(|fd| {
            machine::end_by_signal()?;
            jail::enter_machine(&walls.accept_missing)?;
            seccomp::confine(seccomp::Thread::Boot)?;
            Ok(machine::run(fd, &logger)?)
        }),
        Role::Files(walls) => control().and_then(|fd| {
            let jail = jail::enter_files(&walls.accept_missing)?;
            seccomp::confine(seccomp::Thread::Folder)?;
            Ok(files::run_jailed(fd, jail, &logger)?)
        }),
        Role::Walls(walls) => try_walls(&walls.accept_missing),
        Role::Filters => seccomp::print(&mut std::io::stdout().lock()).map_err(Into::into),
        Role::Probe => probe::run().map_err(Into::into),
        Role::Boot(options) => launcher::boot(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(logger, "husk-vmm: failed"; "error" => format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Enters the jail of a machine and its filter, and says what it found.
fn try_walls(accept_missing: &[jail::Wall]) -> anyhow::Result<()> {
    anyhow::ensure!(!UNJAILED, "this husk-vmm was built without walls, to measure them");
    let landlock = jail::enter_machine(accept_missing)?;
    seccomp::confine(seccomp::Thread::Boot)?;
    let landlock = match landlock {
        jail::Landlock::Whole => "Landlock",
        jail::Landlock::Partly => "Landlock (without the newer of its rules)",
        jail::Landlock::Missing => "no Landlock, which is accepted",
    };
    println!("namespaces, empty root, no rights, system call filters, {landlock}");
    Ok(())
}

/// The control socket, which whoever started this process has left as descriptor 3.
fn control() -> anyhow::Result<OwnedFd> {
    // SAFETY: asks for flags of a descriptor by number, whatever it is.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        anyhow::bail!("descriptor {CONTROL_FD} is no control socket: the shim starts this program");
    }
    // SAFETY: the descriptor is open, as just seen, and nothing in this process knows of it yet.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    debug_assert_eq!(control.as_raw_fd(), CONTROL_FD);
    Ok(control)
}

fn logger(level: Level) -> Logger {
    // One write a line: its reader is woken once.
    let lines = std::io::LineWriter::new(std::io::stderr());
    let drain = slog_json::Json::new(lines).add_default_keys().build();
    let drain = Mutex::new(drain).filter_level(level).fuse();
    Logger::root(drain, o!())
}

fn level(text: &str) -> Result<Level, String> {
    Level::from_str(text).map_err(|()| format!("there is no level {text:?}"))
}
