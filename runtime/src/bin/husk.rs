//! `husk`: the operator's command.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use husk_configuration::Configuration;
use husk_runtime::check::{self, Outcome};
use husk_runtime::shell::{self, ShellCommand};
use husk_runtime::{chain, operator, printable, state};

/// Looks after Husk on this host
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say whether this host can run Husk, one line for each thing it needs; status 1 if it cannot
    Check {
        /// Settings other than $HUSK_CONFIG or /etc/husk/husk.toml
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// List the sandboxes: state, age, memory and processor time on this host, containers
    Ps,
    /// Show the console of a sandbox's guest, on which its kernel and its agent log
    Logs {
        /// The sandbox, or the beginning of its name
        sandbox: String,
        /// containerd's namespace, where two sandboxes have the same name
        #[arg(long, short)]
        namespace: Option<String>,
    },
    /// Start a program of this host's in a sandbox's guest, outside its containers: busybox's shell,
    /// or busybox as COMMAND. Only if `guest.debug_shell` was set when the sandbox started
    Exec {
        /// containerd's namespace, where two sandboxes have the same name
        #[arg(long, short)]
        namespace: Option<String>,
        /// Settings other than $HUSK_CONFIG or /etc/husk/husk.toml
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The sandbox, or the beginning of its name
        sandbox: String,
        /// What the program is called as, and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, default_value = "sh")]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Check { config } => return check(config.as_deref()),
        Command::Ps => ps(),
        Command::Logs { sandbox, namespace } => logs(&sandbox, namespace.as_deref()),
        Command::Exec { namespace, config, sandbox, command } => {
            match exec(namespace.as_deref(), config.as_deref(), &sandbox, command) {
                Ok(status) => return ExitCode::from(status),
                Err(error) => Err(error),
            }
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn check(config: Option<&Path>) -> ExitCode {
    let findings = check::run(config);
    for finding in &findings {
        println!("{finding}");
    }
    let bad = findings.iter().filter(|finding| finding.outcome == Outcome::Bad).count();
    if bad == 0 {
        println!("This host can run Husk.");
        return ExitCode::SUCCESS;
    }
    println!("This host cannot run Husk: {bad} of {} checks failed.", findings.len());
    ExitCode::FAILURE
}

fn ps() -> anyhow::Result<()> {
    let root = Path::new(state::ROOT);
    let sandboxes = operator::list(root).with_context(|| root.display().to_string())?;
    println!(
        "{:<12} {:<24} {:<9} {:>8} {:>10} {:>10}  CONTAINERS",
        "NAMESPACE", "SANDBOX", "STATE", "AGE", "MEMORY", "CPU"
    );
    for one in sandboxes {
        println!(
            "{:<12} {:<24} {:<9} {:>8} {:>6} MiB {:>8.1} s  {}",
            printable::line(&one.namespace),
            printable::line(&one.id),
            one.state,
            age(one.age),
            one.memory >> 20,
            one.cpu.as_secs_f64(),
            printable::line(&one.containers.join(" "))
        );
    }
    Ok(())
}

/// In the largest unit that leaves a number of two.
fn age(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn logs(sandbox: &str, namespace: Option<&str>) -> anyhow::Result<()> {
    let log = operator::console(Path::new(state::ROOT), namespace, sandbox)?;
    match printable::copy(log, std::io::stdout().lock()) {
        // `husk logs SANDBOX | head`: its reader has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot copy the console to standard output"),
    }
}

fn exec(
    namespace: Option<&str>,
    config: Option<&Path>,
    sandbox: &str,
    arguments: Vec<String>,
) -> anyhow::Result<u8> {
    let (sandbox, folder) = operator::find(Path::new(state::ROOT), namespace, sandbox)?;
    let program = Configuration::load(config)?.guest.debug_shell_program;
    Ok(shell::run(ShellCommand { folder, sandbox, program, arguments })?)
}
