//! Tells of tests that cannot run on this host: `make test` runs them in the test machine instead, and
//! lists those that could not run there either.

use std::fmt::Display;
use std::io::Write;
use std::thread::{Builder, JoinHandle};

/// Says on standard error, where the test runner does not swallow it, that the current test is skipped.
///
/// The line names the program, the test (the thread's name, as the test runner sets it) and the reason,
/// parted by `: `. `tests/run` reads it.
pub fn skipped(reason: impl Display) {
    let program = std::env::current_exe().unwrap_or_default();
    let thread = std::thread::current();
    let test = thread.name().unwrap_or_default();
    let line = format!("skipped: {}: {test}: {reason}\n", program.display());
    // One write: tests run side by side.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Starts a thread of the current test, by its name, so that [`skipped`] knows it there too.
///
/// # Panics
///
/// If no thread can be started.
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    Builder::new().name(name).spawn(work).expect("a thread of the test")
}
