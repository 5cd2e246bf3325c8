//! `husk exec`: a program of the host's in the guest itself, beside its containers.
//!
//! The operator's command ([`client`]) opens the program and asks the shim at a socket in the sandbox's
//! folder ([`door`]), which is there only if `guest.debug_shell` allows it. The shim has the agent start
//! the program and hands the streams' ends back: what the shell reads and writes does not pass through
//! the shim.
//!
//! ```text
//!   husk exec ──Start, program──▶ shim ──StartShell──▶ agent
//!             ◀─Started, streams─      ◀──dials────────
//!             ──Resize───────────▶     ──ResizeTerminal▶
//!             ◀─Exited───────────      ◀──exit──────────
//!             ──hangs up─────────▶     ──DeleteProcess─▶   ends it, if it still runs
//! ```

mod client;
mod door;
mod message;
mod program;

pub use client::{ShellCommand, ShellError, run};
pub use door::ShellDoor;
pub use program::ProgramError;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// The socket's name in the sandbox's folder.
pub(crate) const SOCKET: &str = "shell.sock";

/// The socket's path in `folder`, short enough for a socket address while the file lives.
fn short(folder: &Path) -> io::Result<(File, PathBuf)> {
    let folder = File::open(folder)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()));
    Ok((folder, path))
}
