//! File systems and file servers that never answer: they hold up whatever uses them, nothing else, and keep
//! nothing from being deleted.
//!
//! runc has no twin: there such a container stays, and its pod with it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_silent::SilentFs;
use husk_tests::containerd::{Run, Runtime, first_of};
use husk_tests::cri::{Inside, Pod, RUNNING, Wanted};
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::processes::{Role, find, signal};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until_true};
use nix::sys::signal::Signal;

use crate::Case;
use crate::faults::{ended_badly, forget_fifos};

pub const HUSK_CASES: &[Case] = &[("silent::volume", volume), ("silent::file_server", file_server)];

/// In what time an emulated machine does what nothing holds up.
const AT_ONCE: Duration = Duration::from_secs(15);

/// In what time a guest that does not let go of a process has lost its machine: 30 s, and some for an
/// emulated one.
const GIVEN_UP: Duration = Duration::from_secs(60);

fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let since = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    let took = since.elapsed();
    println!("took: {what} {took:.1?}");
    ensure!(took < limit, "{what} took {took:?}");
    Ok(done)
}

/// That nothing holds up a container: its processes, probes and state.
fn goes_on(pod: &Pod, id: &str) -> Result<()> {
    within(AT_ONCE, "an exec beside it", || {
        ensure!(pod.shell(id, "ls / > /tmp/list; cat /etc/passwd > /dev/null; echo on")? == "on");
        ensure!(pod.status(id)?.state == RUNNING && pod.is_ready()?);
        pod.stats(id).map(drop)
    })
}

/// A volume that is silent before its container's first process is made, and one that falls silent later:
/// the pod's other containers go on, and everything can be deleted.
fn volume(runtime: Runtime) -> Result<()> {
    // What stays when the first pod of a machine has gone is there already.
    drop(Pod::run(Runtime::Runc, &Wanted::default())?);
    let before = Listing::now()?;
    let place = tempfile::tempdir()?;
    let silent = SilentFs::mount(place.path())?;
    let pod = Pod::run(runtime, &Wanted::default())?;
    let sleeping = |name| Inside { name, line: "sleep 1000", ..Inside::default() };
    let with = |name, line| Inside {
        name,
        line,
        volumes: vec![(place.path().to_owned(), "/volume")],
        ..Inside::default()
    };
    let first = pod.container(&sleeping("first"))?;
    let line = "until [ -e /tmp/go ]; do sleep 0.1; done; ls /volume; sleep 1000";
    let running = pod.container(&with("running", line))?;
    ensure!(pod.shell(&running, "ls -A /volume | wc -l")? == "0");
    // containerd has looked at the volume, the shim not yet.
    let late = pod.create(&with("late", "true"))?;
    silent.fall_silent();
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| pod.start(&late));
        until_true("it is asked", PATIENCE, || Ok(silent.unanswered() > 0))?;
        goes_on(&pod, &first)?;
        let other = within(AT_ONCE, "a container beside it", || pod.container(&sleeping("other")))?;
        within(AT_ONCE, "its removal", || {
            pod.stop(&other, 0)?;
            pod.remove(&other)
        })?;
        ensure!(!starting.is_finished(), "nothing was waited for");
        let failed = starting.join().unwrap_or(Ok(())).err().context("it was started")?;
        ensure!(format!("{failed:#}").contains("did not answer within"), "{failed:#}");
        anyhow::Ok(())
    })?;
    within(AT_ONCE, "the removal of one that was not started", || pod.remove(&late))?;
    let asked = silent.unanswered();
    pod.shell(&running, "touch /tmp/go")?;
    until_true("the guest waits", PATIENCE, || Ok(silent.unanswered() > asked))?;
    goes_on(&pod, &first)?;
    // Nothing but the end of its machine ends such a process.
    within(GIVEN_UP, "the end of one that waits", || pod.stop(&running, 0))?;
    within(AT_ONCE, "its removal", || pod.remove(&running))?;
    ensure!(pod.ended(&first)?.exit_code == 137);
    within(GIVEN_UP, "the end of the pod", || pod.stop_sandbox())?;
    drop(pod);
    drop(silent);
    drop(place);
    nothing_left(&before, CLEAN_UP)
}

/// A file server that stands still: what waits for it in the guest cannot be killed there.
fn file_server(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let before = Listing::now()?;
    let line = "until [ -e /tmp/go ]; do sleep 0.1; done; cat /etc/services; sleep 1000";
    let run = Run::shell(runtime, line).keep();
    let child = run.spawn_running()?;
    let task = Task::running(&run.id);
    let files = find(Role::Files, &run.id).context("no file server")?;
    signal(files, Signal::SIGSTOP)?;
    // The shell looks for the file again and again.
    std::thread::sleep(Duration::from_secs(2));
    within(AT_ONCE, "the state", || task.becomes("RUNNING"))?;
    within(GIVEN_UP, "the end", || {
        run.kill("SIGKILL")?;
        ended_badly(child)
    })?;
    within(GIVEN_UP, "the removal", || {
        drop(task);
        Ok(())
    })?;
    forget_fifos()?;
    nothing_left(&before, CLEAN_UP)
}
