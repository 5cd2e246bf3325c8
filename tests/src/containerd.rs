//! containerd as a person at the terminal has it: through `ctr`.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::client::{has_image, remove_container, task_is};
use crate::wait::{PATIENCE, until};

/// The runtimes that every case runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The twin that says what is right.
    Runc,
    /// The one under test.
    Husk,
    /// The same without a pause container: containerd 2.x asks its shim for pods' sandboxes.
    HuskSandbox,
}

impl Runtime {
    /// The name in a test's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Husk => "husk",
            Self::HuskSandbox => "husk-sandbox",
        }
    }

    /// The name containerd knows it by.
    pub fn shim(self) -> &'static str {
        match self {
            Self::Runc => "io.containerd.runc.v2",
            Self::Husk | Self::HuskSandbox => "io.containerd.husk.v2",
        }
    }
}

/// The small image: busybox alone.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// The image with a real userland: Debian's minimal base.
pub const DEBIAN: &str = "docker.io/library/debian:latest";
/// Where [`Run::probe`] puts the probe.
pub const PROBE: &str = "/probe";

/// After this a container counts as hung.
const LIMIT: Duration = Duration::from_secs(600);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How a finished `ctr run` looked.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `ctr` passes the container's on.
    pub code: i32,
    /// What came on standard output.
    pub stdout: Vec<u8>,
    /// What came on standard error.
    pub stderr: String,
}

impl Finished {
    /// Standard output as trimmed text, if the exit code was `code`.
    pub fn text(&self, code: i32) -> Result<String> {
        let text = String::from_utf8_lossy(&self.stdout).trim_end().to_owned();
        let from = text.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
        ensure!(
            self.code == code,
            "exit code {} instead of {code}; stdout ends: {}; stderr: {}",
            self.code,
            &text[from..],
            self.stderr
        );
        Ok(text)
    }
}

/// A `ctr run` in the making.
#[derive(Debug, Clone)]
pub struct Run {
    /// The container's id.
    pub id: String,
    runtime: Runtime,
    image: &'static str,
    keep: bool,
    // With a spec of its own a container has no image: its root file system is named in the spec.
    spec: Option<std::sync::Arc<tempfile::NamedTempFile>>,
    flags: Vec<String>,
    command: Vec<String>,
}

impl Run {
    /// A container of the small image.
    pub fn new(runtime: Runtime, command: &[&str]) -> Self {
        let id = format!("{}-{}", runtime.name(), NEXT.fetch_add(1, Ordering::Relaxed));
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        Self { id, runtime, image: BUSYBOX, keep: false, spec: None, flags: Vec::new(), command }
    }

    /// A container of the small image that runs a shell line.
    pub fn shell(runtime: Runtime, line: &str) -> Self {
        Self::new(runtime, &["sh", "-c", line])
    }

    /// A container of the small image that runs the probe.
    pub fn probe(runtime: Runtime, words: &[&str]) -> Result<Self> {
        Self::new(runtime, &[&[PROBE], words].concat()).with_probe()
    }

    /// Puts the probe into it, at [`PROBE`].
    pub fn with_probe(self) -> Result<Self> {
        let mount = format!("type=bind,src={},dst={PROBE},options=rbind:ro", probe_path()?);
        Ok(self.flag("--mount").flag(mount))
    }

    /// A container from a spec that the caller has changed, as clients send that write their specs
    /// themselves; its root file system is a plain folder on the host.
    pub fn spec(runtime: Runtime, line: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let mut run = Self::shell(runtime, line);
        let mut spec = default_spec()?;
        let root = root_folder(&run.id)?;
        spec["root"] = serde_json::json!({ "path": root });
        spec["process"]["args"] = serde_json::json!(run.command);
        spec["process"]["terminal"] = false.into();
        spec["process"]["env"] = serde_json::json!(["PATH=/bin"]);
        spec["linux"]["cgroupsPath"] = format!("/husk-tests/{}", run.id).into();
        change(&mut spec);
        let file = tempfile::NamedTempFile::new()?;
        serde_json::to_writer(file.as_file(), &spec)?;
        run.spec = Some(std::sync::Arc::new(file));
        Ok(run)
    }

    /// Takes another image.
    pub fn image(mut self, image: &'static str) -> Self {
        self.image = image;
        self
    }

    /// Adds a word before the image.
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Leaves the container and its snapshot for later inspection; see [`Run::remove`].
    pub fn keep(mut self) -> Self {
        self.keep = true;
        self
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.args(["run", "--runtime", self.runtime.shim()]);
        if !self.keep {
            command.arg("--rm");
        }
        command.args(&self.flags);
        match &self.spec {
            Some(file) => command.arg("--config").arg(file.path()).arg(&self.id),
            None => command.arg(self.image).arg(&self.id).args(&self.command),
        };
        command
    }

    /// Runs it to its end with nothing on standard input.
    pub fn finish(&self) -> Result<Finished> {
        let mut child = self.spawn()?;
        drop(child.stdin.take());
        finish(child)
    }

    /// Runs it to its end with `input` on standard input.
    ///
    /// The input comes once the task runs: `ctr` forgets to close the container's input if its own
    /// ends before that.
    pub fn finish_with(&self, input: Vec<u8>) -> Result<Finished> {
        let mut child = self.spawn_running()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let finished = finish(child)?;
        // A container that does not read its input closes it under the writer: not an error here.
        drop(writer.join());
        Ok(finished)
    }

    /// Starts it with pipes on its three streams.
    pub fn spawn(&self) -> Result<Child> {
        if self.image == DEBIAN && self.spec.is_none() {
            import_debian()?;
        }
        start(&mut self.ctr())
    }

    /// Starts it and waits until its task is running.
    pub fn spawn_running(&self) -> Result<Child> {
        let mut child = self.spawn()?;
        let runs = until(&format!("{} runs", self.id), PATIENCE, || {
            let ended = child.try_wait()?.is_some();
            Ok(if task_is(&self.id, "RUNNING") { Some(true) } else { ended.then_some(false) })
        })?;
        if !runs {
            let finished = finish(child)?;
            bail!("it ended before it ran: {finished:?}");
        }
        Ok(child)
    }

    /// Sends the running task a signal.
    pub fn kill(&self, signal: &str) -> Result<()> {
        ctr(&["task", "kill", "--signal", signal, &self.id]).map(drop)
    }

    /// The folder on the host that holds what a kept container changed in its root file system.
    pub fn upper_folder(&self) -> Result<std::path::PathBuf> {
        upper_folder(&self.id)
    }

    /// Removes a kept container.
    pub fn remove(&self) -> Result<()> {
        remove_container(&self.id)
    }
}

/// The folder on the host that holds what the container `id` changed in its root file system.
pub(crate) fn upper_folder(id: &str) -> Result<std::path::PathBuf> {
    let mounts = ctr(&["snapshot", "mounts", "/target", id])?;
    let (_, after) = mounts.split_once("upperdir=").context("no overlay snapshot")?;
    let end = after.find([',', ' ', '\n']).unwrap_or(after.len());
    Ok(after[..end].into())
}

/// The spec that `ctr` gives a container, asked for once.
fn default_spec() -> Result<Value> {
    static SPEC: OnceLock<Value> = OnceLock::new();
    if let Some(spec) = SPEC.get() {
        return Ok(spec.clone());
    }
    let spec: Value = serde_json::from_str(&ctr(&["oci", "spec"])?)?;
    Ok(SPEC.get_or_init(|| spec).clone())
}

/// Runs a container unless the runtime has had one: what the first one makes and leaves for the later ones
/// (snapshots of images, folders) is there then, before a listing is taken.
pub fn first_of(runtime: Runtime) -> Result<()> {
    static FIRST: [Mutex<bool>; 3] = [const { Mutex::new(false) }; 3];
    let mut ran = FIRST[runtime as usize].lock().unwrap_or_else(PoisonError::into_inner);
    if !*ran {
        Run::new(runtime, &["true"]).finish()?.text(0)?;
        *ran = true;
    }
    Ok(())
}

/// Imports [`DEBIAN`] unless it is there: it is large, and few rows want it.
fn import_debian() -> Result<()> {
    static IMPORT: Mutex<()> = Mutex::new(());
    let _one = IMPORT.lock().unwrap_or_else(PoisonError::into_inner);
    if has_image(DEBIAN) {
        return Ok(());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/images/debian.tar");
    ctr(&["images", "import", path]).map(drop)
}

/// The probe on the host.
pub fn probe_path() -> Result<String> {
    std::env::var("HUSK_PROBE").context("HUSK_PROBE does not name the probe")
}

/// A root file system of its own for a container without an image; goes with the test machine.
fn root_folder(id: &str) -> Result<std::path::PathBuf> {
    let root = std::path::Path::new("/var/lib/husk-tests").join(id);
    for folder in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for name in String::from_utf8(Command::new("/bin/busybox").arg("--list").output()?.stdout)?
        .lines()
        .filter(|name| *name != "busybox")
    {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    Ok(root)
}

/// Collects what a started `ctr` prints, and its exit code.
pub fn finish(mut child: Child) -> Result<Finished> {
    let mut out = child.stdout.take().context("stdout already taken")?;
    let mut err = child.stderr.take().context("stderr already taken")?;
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        err.read_to_end(&mut text).map(|_| text)
    });
    let (ended, watched) = std::sync::mpsc::channel::<()>();
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let watchdog = std::thread::spawn(move || {
        let late = watched.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout);
        if late {
            report();
            // Not yet waited for, so the number is still this child's.
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
        late
    });
    let mut stdout = Vec::new();
    out.read_to_end(&mut stdout)?;
    let stderr = errors.join().map_err(|_| anyhow::anyhow!("reader panicked"))??;
    drop(ended);
    let late = watchdog.join().map_err(|_| anyhow::anyhow!("watchdog panicked"))?;
    let status = child.wait()?;
    ensure!(!late, "ctr did not end within {LIMIT:?}: {}", String::from_utf8_lossy(&stderr));
    let code = status.code().with_context(|| format!("ctr ended by {status}"))?;
    Ok(Finished { code, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() })
}

/// Prints what every process here waits for: the run goes on, but what hung is lost after it.
fn report() {
    let columns = "pid,ppid,stat,time,wchan:24,args";
    if let Ok(output) = Command::new("ps").args(["-eww", "-o", columns]).output() {
        let text = String::from_utf8_lossy(&output.stdout);
        let lines = text.lines().filter(|line| !line.contains(" [") && !line.contains("ps -eww"));
        eprintln!("hung:\n{}", lines.collect::<Vec<_>>().join("\n"));
    }
}

/// Starts a `ctr` command with pipes on its three streams.
pub fn spawn(words: &[&str]) -> Result<Child> {
    start(Command::new("ctr").args(words))
}

/// Starts a command with pipes on its three streams; [`finish`] collects what it prints.
pub fn start(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
        .spawn()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))
}

/// Runs a `ctr` command that must succeed; its standard output.
pub fn ctr(words: &[&str]) -> Result<String> {
    let mut child = spawn(words)?;
    drop(child.stdin.take());
    let finished = finish(child).with_context(|| format!("ctr {}", words.join(" ")))?;
    ensure!(finished.code == 0, "ctr {}: {}", words.join(" "), finished.stderr);
    Ok(String::from_utf8_lossy(&finished.stdout).into_owned())
}
