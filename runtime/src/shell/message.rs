//! What goes over the socket, in packets of `husk_control`.

use serde::{Deserialize, Serialize};

/// From the operator's command. Root has written it, and it is passed on to the agent as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Question {
    /// First of all; the program's file comes with it.
    Start {
        /// The program's arguments, its name the first.
        arguments: Vec<String>,
        /// Its environment.
        environment: Vec<String>,
        /// Whether it has a terminal.
        terminal: bool,
        /// The terminal's size in characters.
        rows: u32,
        /// See `rows`.
        columns: u32,
    },
    /// The terminal's size has changed.
    Resize {
        /// In characters.
        rows: u32,
        /// See `rows`.
        columns: u32,
    },
}

/// From the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Answer {
    /// It runs; its standard input and output come with this, and without a terminal its standard
    /// error.
    Started,
    /// It has ended.
    Exited {
        /// As a shell says it.
        status: u32,
        /// Bytes that it had written to its standard output.
        output: u64,
        /// The same for standard error.
        error: u64,
    },
    /// There is no shell, or none any more.
    Failed {
        /// Why.
        reason: String,
    },
}
