//! The hooks of an OCI spec that run on the host.
//!
//! They run in the mount namespace that the shim was started in: what they mount is the host's.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::Hook;
use serde::Serialize;
use slog::{Logger, warn};

use crate::apart::{Aside, HostMounts, opened};
use crate::machine::{PidFd, watched_fd};

/// Bytes of a hook's error output that its error repeats.
const LAST_WORDS: u64 = 1024;

/// How long a hook that was killed is waited for.
const KILLED: Duration = Duration::from_secs(5);

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started or followed.
    #[error("{path}")]
    Run {
        /// Its program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{path} ended with {status}: {stderr}")]
    Failed {
        /// Its program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote last to its error output.
        stderr: String,
    },
    /// It took too long.
    #[error("{path} did not end within {seconds} s")]
    Late {
        /// Its program.
        path: PathBuf,
        /// How long it was given.
        seconds: i64,
    },
}

/// The hooks of one container, by the moment.
#[derive(Debug, Clone, Default)]
pub struct HostHooks {
    /// Before the container is created.
    pub create: Vec<Hook>,
    /// After its process was started.
    pub started: Vec<Hook>,
    /// After it was deleted.
    pub stopped: Vec<Hook>,
}

/// What a hook is told on its standard input.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct State {
    pub(super) oci_version: String,
    pub(super) id: String,
    pub(super) status: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) pid: u32,
    pub(super) bundle: PathBuf,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub(super) annotations: HashMap<String, String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(pid: &u32) -> bool {
    *pid == 0
}

/// Runs the hooks one after the other, to the first that fails.
pub(super) async fn run(
    hooks: &[Hook],
    state: &State,
    mounts: &HostMounts,
) -> Result<(), HookError> {
    for hook in hooks {
        run_one(hook, state, mounts).await?;
    }
    Ok(())
}

/// Runs all the hooks; the specification wants no more than a warning of those that fail.
pub(super) async fn run_all(hooks: &[Hook], state: &State, mounts: &HostMounts, log: &Logger) {
    for hook in hooks {
        if let Err(error) = run_one(hook, state, mounts).await {
            warn!(log, "hook failed"; "container" => &state.id, "error" => crate::chain(&error));
        }
    }
}

async fn run_one(hook: &Hook, state: &State, mounts: &HostMounts) -> Result<(), HookError> {
    let path = || hook.path().clone();
    let fail = |source| HookError::Run { path: path(), source };
    let json = serde_json::to_vec(state).map_err(|error| fail(error.into()))?;
    let input = file(c"state", &json).map_err(fail)?;
    let mut errors = file(c"errors", &[]).map_err(fail)?;
    let output = errors.try_clone().map_err(fail)?;
    let (own, bundle, namespace) = (hook.clone(), state.bundle.clone(), mounts.0.clone());
    // Program and bundle may lie on a file system that does not answer.
    let started = opened(move || start(&own, (input, output), &bundle, namespace.as_deref()));
    let child = started.await.map_err(fail)?;
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let in_time = match limit {
        Some(seconds) => {
            tokio::time::timeout(Duration::from_secs(seconds), ended(child.get())).await
        }
        None => Ok(ended(child.get()).await),
    };
    match in_time {
        Ok(result) => result.map_err(fail)?,
        Err(_) => {
            child.kill();
            // One that the kernel does not let go of is not waited for.
            let _ = tokio::time::timeout(KILLED, ended(child.get())).await;
            return Err(HookError::Late { path: path(), seconds: hook.timeout().unwrap_or(0) });
        }
    }
    let status = child.wait().map_err(fail)?;
    if status.success() {
        return Ok(());
    }
    let stderr = last_words(&mut errors).unwrap_or_default();
    Err(HookError::Failed { path: path(), status, stderr })
}

/// A file in memory, read from its beginning.
fn file(name: &std::ffi::CStr, content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

fn last_words(errors: &mut File) -> io::Result<String> {
    let length = errors.metadata()?.len();
    errors.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
    let mut text = Vec::new();
    errors.take(LAST_WORDS).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

/// A hook that runs. Dropping kills its group, so that what it started goes too, and reaps it.
struct Running(Option<Child>);

impl Running {
    fn get(&self) -> Option<&Child> {
        self.0.as_ref()
    }

    /// Kills the hook and what it started. It has not been waited for yet, so the number is still its group's.
    fn kill(&self) {
        let group = self.get().and_then(|child| i32::try_from(child.id()).ok());
        let _ = group.map(|group| killpg(Pid::from_raw(group), Signal::SIGKILL));
    }

    /// The status of a hook that has ended.
    fn wait(mut self) -> io::Result<ExitStatus> {
        self.0.take().ok_or(io::ErrorKind::NotFound)?.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        let Some(mut child) = self.0.take() else { return };
        if !matches!(child.try_wait(), Ok(Some(_))) {
            drop(Aside::new(Reaped(child)));
        }
    }
}

/// A killed child; dropping waits for its end.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

/// Starts a hook, in the calling thread, which ends with that: it leaves for the mount namespace `namespace`.
fn start(
    hook: &Hook,
    (input, errors): (File, File),
    bundle: &Path,
    namespace: Option<&File>,
) -> io::Result<Running> {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    if let Some(environment) = hook.env() {
        command.env_clear();
        command.envs(environment.iter().filter_map(|variable| variable.split_once('=')));
    }
    let folder = if bundle.is_dir() { bundle } else { Path::new("/") };
    command
        .current_dir(folder)
        .process_group(0)
        .stdin(input)
        .stdout(File::create("/dev/null")?)
        .stderr(errors);
    if let Some(namespace) = namespace {
        // Only a thread that shares its folder with no other may leave for another namespace.
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
    }
    Ok(Running(Some(command.spawn()?)))
}

/// Waits for the end of a child; its status is left for `wait`.
async fn ended(child: Option<&Child>) -> io::Result<()> {
    let child = child.ok_or(io::ErrorKind::NotFound)?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let process = watched_fd(PidFd::open(Pid::from_raw(pid))?)?;
    // A hook that is given up is not left running.
    let ended = process.readable().await.map(drop);
    if ended.is_err() {
        let _ = process.get_ref().signal(Signal::SIGKILL);
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn hook(line: &str, timeout: Option<i64>) -> Hook {
        let mut hook = json!({ "path": "/bin/sh", "args": ["hook", "-c", line], "env": ["A=b c"] });
        if let Some(seconds) = timeout {
            hook["timeout"] = seconds.into();
        }
        serde_json::from_value(hook).unwrap()
    }

    fn state(bundle: &Path) -> State {
        State {
            oci_version: "1.0.2".to_owned(),
            id: "c".to_owned(),
            status: "creating",
            pid: 7,
            bundle: bundle.to_owned(),
            annotations: HashMap::from([("x".to_owned(), "y".to_owned())]),
        }
    }

    #[tokio::test]
    async fn hooks_are_told_and_heard() {
        let bundle = tempfile::tempdir().unwrap();
        let state = state(bundle.path());
        let mounts = HostMounts::default();
        let good = hook("cat > told; echo $0 $A > said", None);
        run(&[good], &state, &mounts).await.unwrap();
        let read = |name| std::fs::read_to_string(bundle.path().join(name)).unwrap();
        let told: serde_json::Value = serde_json::from_str(&read("told")).unwrap();
        let expected = json!({
            "ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 7,
            "bundle": bundle.path(), "annotations": {"x": "y"},
        });
        assert_eq!(told, expected);
        assert_eq!(read("said"), "hook b c\n");

        let hooks = [hook("echo no >&2; exit 3", None), hook("touch second", None)];
        let error = run(&hooks, &state, &mounts).await.unwrap_err().to_string();
        assert_eq!(error, "/bin/sh ended with exit status: 3: no");
        assert!(!bundle.path().join("second").exists());
        let log = Logger::root(slog::Discard, slog::o!());
        run_all(&hooks, &state, &mounts, &log).await;
        assert!(bundle.path().join("second").exists());

        let line = "sleep 1000 & echo $! > child; wait";
        let late = run(&[hook(line, Some(1))], &state, &mounts).await.unwrap_err();
        assert_eq!(late.to_string(), "/bin/sh did not end within 1 s");
        let child = Path::new("/proc").join(read("child").trim()).join("exe");
        // It may take a while to die, and whoever adopts it may take its time to bury it.
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        while std::fs::read_link(&child).is_ok() {
            assert!(std::time::Instant::now() < patience, "{} is left", child.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let missing: Hook = serde_json::from_value(json!({ "path": "/no/such" })).unwrap();
        let error = run(&[missing], &state, &mounts).await.unwrap_err();
        assert!(crate::chain(&error).starts_with("/no/such: no such file"), "{error}");
    }

    #[tokio::test]
    async fn what_they_mount_is_the_hosts() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: namespaces need root");
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        let link = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
        let own = link("self");
        // The host is played by another namespace.
        let other = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            File::open("/proc/thread-self/ns/mnt").unwrap()
        });
        let mounts = HostMounts(Some(Arc::new(other.join().unwrap())));
        let look = hook("readlink /proc/self/ns/mnt > seen", None);
        run(&[look], &state(bundle.path()), &mounts).await.unwrap();
        let seen = std::fs::read_to_string(bundle.path().join("seen")).unwrap();
        assert_ne!(Path::new(seen.trim()), own);
        assert_eq!(link("thread-self"), own);
    }
}
