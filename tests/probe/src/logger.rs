//! A logger: what `binary://` URIs name. Runs on the host, and writes as nerdctl's does.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// Appends a line of JSON to the file `path` for each line of the container's, after one that says whose
/// they are.
pub fn run(path: &str) -> Result<()> {
    let file = File::options().create(true).append(true).open(path).context("the log")?;
    let variable = |name| std::env::var(name).with_context(|| format!("no {name}"));
    let (id, namespace) = (variable("CONTAINER_ID")?, variable("CONTAINER_NAMESPACE")?);
    writeln!(&file, "{{\"id\":\"{id}\",\"namespace\":\"{namespace}\"}}")?;
    let file = Mutex::new(file);
    let [out, errors, ready] = [3, 4, 5].map(descriptor);
    drop(ready);
    std::thread::scope(|scope| {
        let errors = scope.spawn(|| copy(errors, "stderr", &file));
        copy(out, "stdout", &file)?;
        errors.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    })
}

fn descriptor(number: RawFd) -> OwnedFd {
    // SAFETY: whoever runs a logger opens three descriptors for it, which nothing else here has.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn copy(from: OwnedFd, stream: &str, to: &Mutex<File>) -> Result<()> {
    for line in BufReader::new(File::from(from)).lines() {
        let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let line = line?;
        let text = line.escape_default();
        let mut to = to.lock().map_err(|_| anyhow::anyhow!("the other reader panicked"))?;
        writeln!(to, "{{\"log\":\"{text}\",\"stream\":\"{stream}\",\"time\":{time}}}")?;
    }
    Ok(())
}
