//! `husk`: the operator's command.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use husk_runtime::check::{self, Outcome};

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
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Check { config } => {
            let findings = check::run(config.as_deref());
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
    }
}
