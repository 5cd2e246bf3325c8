//! Boots an empty guest, once by Husk and once by QEMU's microvm, with the same kernel and initial
//! file system, and says how long each took: from the exec of the monitor until the agent dials
//! in, and until the process has ended after the agent was told to shut down.
//!
//! Meant for the test machine under `--icount`, where a nanosecond is an instruction: see
//! `tests/bench/run`. Which monitor goes first alternates from run to run.
//!
//! `husk-bench files` is no boot: the steps of the part `files`, for the inside of a container.

mod files;
mod guest;
mod husk;
mod process;
mod qemu;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

/// The command line.
#[derive(Parser)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    boots: Option<Arguments>,
}

#[derive(Subcommand)]
enum Command {
    /// Does one step of the part `files`.
    Files(files::Step),
}

/// What is booted, and how often.
#[derive(clap::Args)]
struct Arguments {
    /// The guest's kernel.
    #[arg(long)]
    kernel: PathBuf,
    /// The guest's initial file system, with the agent as /init.
    #[arg(long)]
    initrd: PathBuf,
    /// The husk-vmm to measure; without it only QEMU is.
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// The QEMU to compare with.
    #[arg(long, default_value = "/usr/bin/qemu-system-x86_64")]
    qemu: PathBuf,
    /// Leaves QEMU out.
    #[arg(long)]
    alone: bool,
    /// The kernel command line of both; QEMU's gets its own way to reset.
    #[arg(long, default_value = husk_control::DEFAULT_COMMAND_LINE)]
    command_line: String,
    /// Gives Husk's guest a serial console, logged to this file: to see where its time goes.
    #[arg(long)]
    console: Option<PathBuf>,
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// The guest's virtual CPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Virtual CPUs there can be (Husk only).
    #[arg(long, default_value_t = 0)]
    max_vcpus: u8,
    /// Guest memory there can be, in MiB (Husk only).
    #[arg(long, default_value_t = 0)]
    max_memory: u64,
    /// Boots of each; one more before them does not count.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Where the measurements go as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One boot.
#[derive(Clone, Copy)]
struct Boot {
    /// Exec to the agent's call.
    ready: Duration,
    /// Exec to the end of the process.
    ended: Duration,
}

/// A way to boot the guest.
type Booter = fn(&Arguments) -> Result<Boot>;

fn main() -> Result<()> {
    let CommandLine { command, boots } = CommandLine::parse();
    if let Some(Command::Files(step)) = command {
        return files::run(&step);
    }
    let arguments = boots.context("nothing to boot")?;
    ensure!(arguments.runs > 0, "--runs must be at least 1");
    let mut peers: Vec<(&str, Booter, Vec<Boot>)> = Vec::new();
    if !arguments.alone {
        peers.push(("qemu-microvm", qemu::boot, Vec::new()));
    }
    if arguments.vmm.is_some() {
        peers.push(("husk", husk::boot, Vec::new()));
    }
    for run in 0..=arguments.runs {
        for (_, boot, boots) in &mut peers {
            let measured = boot(&arguments)?;
            if run > 0 {
                boots.push(measured);
            }
        }
        peers.reverse();
    }
    peers.sort_by_key(|(name, ..)| *name == "husk");

    println!("{:<14}{:>12}{:>12}   least of {}, ms", "", "ready", "ended", arguments.runs);
    let mut shown = Vec::new();
    for (name, _, boots) in &peers {
        let ready = least(boots, |boot| boot.ready);
        let ended = least(boots, |boot| boot.ended);
        println!("{name:<14}{ready:>12.1}{ended:>12.1}");
        shown.push((ready, ended));
    }
    if let [qemu, husk] = shown[..] {
        println!("{:<14}{:>12.3}{:>12.3}", "husk / qemu", husk.0 / qemu.0, husk.1 / qemu.1);
    }
    if let Some(path) = &arguments.json {
        let all: serde_json::Map<_, _> = peers
            .iter()
            .map(|(name, _, boots)| {
                let pairs: Vec<_> =
                    boots.iter().map(|b| [milliseconds(b.ready), milliseconds(b.ended)]).collect();
                ((*name).to_owned(), serde_json::json!({ "ready_ended_ms": pairs }))
            })
            .collect();
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The least value in milliseconds: instructions repeat, and where a boot waits for the host the
/// counting clock leaps, which only ever adds.
fn least(boots: &[Boot], of: impl Fn(&Boot) -> Duration) -> f64 {
    boots.iter().map(of).min().map_or(f64::NAN, milliseconds)
}
