//! Containers and pods that several rows share, one for each runtime: a boot costs more than most rows.
//!
//! Whichever row comes first makes what it needs; the others find it there. Rows whose lines look at the
//! container's own first process, and at what that one was given, are run by it, one after the other, as
//! [`Part`]s of one script.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use husk_tests::containerd::{Finished, Run, Runtime};

/// Something that is made once for each runtime.
pub struct Shared<T> {
    make: fn(Runtime) -> Result<T>,
    made: [Mutex<Option<Arc<T>>>; 3],
}

impl<T> Shared<T> {
    /// Describes what `make` makes.
    pub const fn new(make: fn(Runtime) -> Result<T>) -> Self {
        Self { make, made: [const { Mutex::new(None) }; 3] }
    }

    /// Returns the runtime's one, and makes it if it is not there.
    pub fn of(&self, runtime: Runtime) -> Result<Arc<T>> {
        let made = &self.made[runtime as usize];
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &*made {
            return Ok(Arc::clone(there));
        }
        let new = Arc::new((self.make)(runtime)?);
        *made = Some(Arc::clone(&new));
        Ok(new)
    }
}

/// A shared thing that can be ended, whatever it holds.
trait End: Sync {
    fn end(&self, runtime: Runtime);
}

impl<T: Send + Sync> End for Shared<T> {
    fn end(&self, runtime: Runtime) {
        let made = &self.made[runtime as usize];
        made.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Everything that is shared.
fn all() -> [&'static dyn End; 17] {
    [
        &crate::attack::OTHER,
        &crate::files::DEFAULT,
        &crate::host::HOST,
        &crate::mounts::BOUND,
        &crate::mounts::SPECIFIED,
        &crate::process::FLAGGED,
        &crate::process::PRIVILEGED,
        &crate::process::SPECIFIED,
        &crate::process::USER,
        &crate::process::GROUPS,
        &crate::userland::DEBIAN_RAN,
        &crate::within::SHARED,
        &crate::laid::BRIDGED,
        &crate::laid::SIBLINGS,
        &crate::laid::TWO,
        &crate::pods::POD,
        &crate::pods::SET,
    ]
}

/// Ends what a runtime's rows have shared: before rows that look at the whole machine, and before a row is
/// tried again.
pub fn end(runtime: Runtime) {
    for shared in all() {
        shared.end(runtime);
    }
}

/// A row's part of a script that several rows share.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    name: &'static str,
    line: &'static str,
    by_init: bool,
}

impl Part {
    /// A shell line that runs in a subshell of the container's first process.
    pub const fn new(name: &'static str, line: &'static str) -> Self {
        Self { name, line, by_init: false }
    }

    /// A shell line that the container's first process runs itself.
    pub const fn by_init(name: &'static str, line: &'static str) -> Self {
        Self { name, line, by_init: true }
    }

    /// Returns what has come of it, if the exit code was `code`.
    pub fn text(&self, ran: &Ran, code: i32) -> Result<String> {
        self.finished(ran)?.text(code)
    }

    /// Returns how it ended.
    pub fn finished<'a>(&self, ran: &'a Ran) -> Result<&'a Finished> {
        ran.parts.get(self.name).with_context(|| format!("{} has not run", self.name))
    }
}

/// Around a part's name (and its exit code), which follow what it has written, on both streams.
const MARKS: (char, char) = ('\u{2}', '\u{1}');

/// Returns a script that runs `parts` one after the other.
pub fn script(parts: &[Part]) -> String {
    let mut script = String::new();
    for Part { name, line, by_init } in parts {
        let (open, close) = if *by_init { ('{', '}') } else { ('(', ')') };
        // Writing to a string does not fail.
        let _ = write!(
            script,
            "{open} {line}\n{close}\nprintf '\\002%s %s\\001' {name} $?; printf '\\002%s\\001' {name} >&2\n"
        );
    }
    script + "exit 0\n"
}

/// A shared script that has run.
pub struct Ran {
    parts: HashMap<String, Finished>,
    /// Folders of the host's that the container had.
    pub folders: Vec<tempfile::TempDir>,
}

/// Runs a container of [`script`].
pub fn ran(run: &Run) -> Result<Ran> {
    let finished = run.finish()?;
    let out = finished.text(0)?;
    let mut errors = HashMap::new();
    for part in finished.stderr.split_terminator(MARKS.1) {
        let (text, name) = part.rsplit_once(MARKS.0).context("no name")?;
        errors.insert(name, text);
    }
    let mut parts = HashMap::new();
    for part in out.split_terminator(MARKS.1) {
        let (text, end) = part.rsplit_once(MARKS.0).context("no name")?;
        let (name, code) = end.rsplit_once(' ').context("no code")?;
        let stderr = errors.remove(name).with_context(|| format!("no errors of {name}"))?;
        let (code, stdout) = (code.parse()?, text.as_bytes().to_vec());
        parts.insert(name.to_owned(), Finished { code, stdout, stderr: stderr.to_owned() });
    }
    Ok(Ran { parts, folders: Vec::new() })
}
