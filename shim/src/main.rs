//! `containerd-shim-husk-v2`: containerd's side of Husk, `io.containerd.husk.v2`.
//!
//! containerd calls the program in four ways, told apart by its arguments:
//! `start` prints the address of a sandbox's shim, starting one if there is none ([`bootstrap`]);
//! without an action it is that shim ([`serve`]); `delete` clears up after a shim that is gone
//! ([`delete`]); `-info` says what the runtime is ([`info`]).

mod address;
mod arguments;
mod boot;
mod bootstrap;
mod connections;
mod daemon;
mod delete;
mod error;
mod features;
mod info;
mod log;
mod memory;
mod options;
mod publisher;
mod records;
mod serve;
mod service;

use std::process::ExitCode;

use anyhow::{Context, bail};
use arguments::Flags;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd hands this to the person at the terminal.
            eprintln!("containerd-shim-husk-v2: {}", husk_runtime::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[std::ffi::OsString]) -> anyhow::Result<()> {
    let flags = Flags::parse(arguments)?;
    if flags.version {
        println!("containerd-shim-husk-v2:");
        println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return info::print();
    }
    if flags.namespace.is_empty() {
        bail!("shim namespace cannot be empty; this program is run by containerd");
    }
    match flags.action.as_str() {
        "start" => bootstrap::start(&flags),
        "delete" => delete::delete(&flags),
        "" => serve::serve(&flags).context("shim"),
        other => bail!("unknown action {other}; known are start and delete"),
    }
}
