//! `husk-agent`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    husk_agent::run()
}
