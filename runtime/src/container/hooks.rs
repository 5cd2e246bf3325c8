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

use crate::apart::{HostMounts, apart};
use crate::machine::{PidFd, watched_fd};

/// Bytes of a hook's error output that its error repeats.
const LAST_WORDS: u64 = 1024;

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
    let mut child = start(hook, &input, &errors, state, mounts).map_err(fail)?;
    let ended = ended(&child);
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let in_time = match limit {
        Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), ended).await,
        None => Ok(ended.await),
    };
    match in_time {
        Ok(result) => result.map_err(fail)?,
        Err(_) => {
            // Not waited for yet, so the number is still its group's: what it started goes too.
            let group = i32::try_from(child.id()).map(Pid::from_raw);
            let _ = group.map(|group| killpg(group, Signal::SIGKILL));
            let _ = child.wait();
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

fn start(
    hook: &Hook,
    input: &File,
    errors: &File,
    state: &State,
    mounts: &HostMounts,
) -> io::Result<Child> {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    if let Some(environment) = hook.env() {
        command.env_clear();
        command.envs(environment.iter().filter_map(|variable| variable.split_once('=')));
    }
    let folder = if state.bundle.is_dir() { state.bundle.as_path() } else { Path::new("/") };
    command.current_dir(folder);
    command
        .process_group(0)
        .stdin(input.try_clone()?)
        .stdout(File::create("/dev/null")?)
        .stderr(errors.try_clone()?);
    let Some(namespace) = &mounts.0 else { return command.spawn() };
    // Only a thread that shares its folder with no other may leave for another namespace.
    apart(|| {
        unshare(CloneFlags::CLONE_FS)?;
        setns(namespace, CloneFlags::CLONE_NEWNS)?;
        command.spawn()
    })
}

/// Waits for the end of a child; its status is left for `wait`.
async fn ended(child: &Child) -> io::Result<()> {
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
