//! What differs between versions of containerd: on another one than the host's, which `CONTAINERD`
//! names by its folder.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use husk_tests::containerd::{Run, Runtime, ctr};
use husk_tests::cri::{Inside, Pod, RUNNING, Wanted};
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::processes::Role;
use husk_tests::task::Task;
use husk_tests::wait::CLEAN_UP;
use libtest_mimic::Arguments;

use crate::faults::strike;
use crate::{Case, daemon, end_shared, pods, trials};

/// The calls of a task by `ctr`, and whole pods.
const CASES: &[Case] = &[("versions::task", task)];

/// Pods whose sandbox is asked of the shim.
const SANDBOX_CASES: &[Case] = &[
    ("versions::lost_machine", |runtime| lost(runtime, |id| strike(Role::Machine, id))),
    ("versions::lost_shim", |runtime| lost(runtime, |id| strike(Role::Shim, id))),
    ("versions::restart_with_a_sandbox", restart),
];

/// The folder of the containerd that is up, if it is not the host's.
pub fn folder() -> Option<String> {
    std::env::var("CONTAINERD").ok().filter(|folder| !folder.is_empty())
}

/// Runs everything here on the containerd of `folder`.
pub fn run(folder: &str, mut arguments: Arguments) -> Result<()> {
    let second = folder.contains("/containerd-2");
    let both = [Runtime::Runc, Runtime::Husk];
    let mut side_by_side = trials(CASES, &both);
    side_by_side.extend(trials(pods::OF_EACH_VERSION, &both));
    // 1.7 asks no shim for a sandbox unless it is told to experiment, and `ctr sandboxes` works in neither.
    let mut one_by_one = Vec::new();
    if second {
        side_by_side.extend(trials(pods::OF_A_SANDBOX, &[Runtime::HuskSandbox]));
        one_by_one = trials(SANDBOX_CASES, &[Runtime::HuskSandbox]);
    }
    let first = libtest_mimic::run(&arguments, side_by_side);
    end_shared();
    arguments.test_threads = Some(1);
    let last = libtest_mimic::run(&arguments, one_by_one);
    if first.has_failed() || last.has_failed() {
        std::process::exit(101);
    }
    Ok(())
}

fn task(runtime: Runtime) -> Result<()> {
    let finished = Run::shell(runtime, "echo out; echo err >&2; exit 3").finish()?;
    ensure!(finished.text(3)? == "out" && finished.stderr == "err\n", "{finished:?}");
    let input = Run::shell(runtime, "wc -c").finish_with(vec![b'x'; 100_000])?;
    ensure!(input.text(0)? == "100000", "{input:?}");
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]))?;
    ensure!(task.shell("echo added")? == "added");
    ensure!(task.metrics()?["memory"]["usage"].as_u64().unwrap_or(0) > 0);
    ensure!(task.call("ps")?.lines().count() == 2);
    task.call("pause")?;
    task.becomes("PAUSED")?;
    task.call("resume")?;
    ctr(&["task", "kill", "--signal", "SIGKILL", &task.id])?;
    task.becomes("STOPPED")
}

fn sleeping<'a>(name: &'a str) -> Inside<'a> {
    Inside { name, line: "sleep 1000", ..Inside::default() }
}

/// The machine or the shim of a pod dies: the kubelet is told that its sandbox is not ready, its
/// containers have ended, and removing it leaves nothing.
fn lost(runtime: Runtime, kill: fn(&str) -> Result<()>) -> Result<()> {
    // What is made once and stays is made by this one.
    let pod = Pod::run(runtime, &Wanted::default())?;
    pod.container(&sleeping("one"))?;
    drop(pod);
    let before = Listing::now()?;
    let pod = Pod::run(runtime, &Wanted::default())?;
    let id = pod.container(&sleeping("one"))?;
    ensure!(pod.is_ready()?);
    kill(&pod.id)?;
    ensure!(pod.ended(&id)?.exit_code == 255);
    let since = Instant::now();
    while pod.is_ready()? {
        ensure!(since.elapsed() < CLEAN_UP, "it is still ready");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(pod);
    nothing_left(&before, CLEAN_UP)
}

/// containerd is killed and comes again: a pod that has no container of its own goes on.
fn restart(runtime: Runtime) -> Result<()> {
    let mut pod = Pod::run(runtime, &Wanted::default())?;
    let id = pod.container(&sleeping("one"))?;
    daemon::restart(Duration::from_secs(1))?;
    pod.connect_again()?;
    ensure!(pod.is_ready()?);
    ensure!(pod.status(&id)?.state == RUNNING);
    ensure!(pod.shell(&id, "echo alive")? == "alive");
    let other = pod.container(&sleeping("other"))?;
    ensure!(pod.shell(&other, "echo added")? == "added");
    pod.stop_sandbox()?;
    ensure!(!pod.is_ready()?);
    let left = std::fs::read_dir("/run/husk").map(Iterator::count).unwrap_or(0);
    ensure!(left == 0, "{left} namespaces in /run/husk");
    Ok(())
}
