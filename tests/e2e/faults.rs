//! What happens when one of Husk's processes is killed: the container's end is told once, and nothing is
//! left behind.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::client::task_is;
use husk_tests::containerd::{Run, Runtime, finish, first_of, spawn};
use husk_tests::events::Events;
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::processes::{Role, find, signal};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until};
use nix::sys::signal::Signal;

use crate::Case;

pub const HUSK_CASES: &[Case] = &[
    ("faults::shim", |_| at_every_moment(Role::Shim)),
    ("faults::machine", |_| at_every_moment(Role::Machine)),
    ("faults::file_server", |_| at_every_moment(Role::Files)),
    ("faults::guest", guest),
];

/// When it is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// As soon as it is there.
    Born,
    /// So many milliseconds later: while the machine boots, or the container is made.
    Later(u64),
    /// While the container runs.
    Running,
    /// While a process is being added.
    Adding,
    /// While the container is paused.
    Paused,
    /// Just after the container has been killed itself.
    Killed,
}

const MOMENTS: [Moment; 8] = [
    Moment::Born,
    Moment::Later(300),
    Moment::Later(1000),
    Moment::Later(2000),
    Moment::Running,
    Moment::Adding,
    Moment::Paused,
    Moment::Killed,
];

/// Kills a process of the sandbox as soon as it is there.
pub fn strike(victim: Role, id: &str) -> Result<()> {
    let pid = until(&format!("a {victim:?} of {id}"), PATIENCE, || Ok(find(victim, id)))?;
    signal(pid, Signal::SIGKILL)
}

fn at_every_moment(victim: Role) -> Result<()> {
    first_of(Runtime::Husk)?;
    let mut events = Events::follow()?;
    let mut ids = Vec::new();
    for moment in MOMENTS {
        let (id, began) = at(victim, moment).with_context(|| format!("{victim:?} {moment:?}"))?;
        ids.push((moment, id, began));
    }
    // Those that come late are seen as well.
    let seen = events.within(Duration::from_secs(1));
    for (moment, id, began) in ids {
        let of_it = seen.iter().filter(|event| event.id == id);
        let exits = of_it.clone().filter(|event| event.topic == "/tasks/exit").count();
        let wanted = if matches!(moment, Moment::Adding) { 1..=2 } else { 1..=1 };
        let right = !began || wanted.contains(&exits);
        ensure!(right, "{victim:?} {moment:?}: {exits} exits in {:?}", of_it.collect::<Vec<_>>());
    }
    // Whoever comes next finds everything in order.
    Run::new(Runtime::Husk, &["true"]).finish()?.text(0).map(drop)
}

/// Returns the container's id, and whether it is certain that it began.
fn at(victim: Role, moment: Moment) -> Result<(String, bool)> {
    let before = Listing::now()?;
    let run = Run::new(Runtime::Husk, &["sleep", "1000"]).keep();
    let child = run.spawn()?;
    // Ends and removes what is left for a client to remove.
    let task = Task::running(&run.id);
    let mut began = true;
    match moment {
        Moment::Born => {
            strike(victim, &run.id)?;
            began = false;
        }
        Moment::Later(milliseconds) => {
            until(&format!("a {victim:?}"), PATIENCE, || Ok(find(victim, &run.id)))?;
            std::thread::sleep(Duration::from_millis(milliseconds));
            began = task_is(&run.id, "RUNNING");
            strike(victim, &run.id)?;
        }
        Moment::Running => {
            task.becomes("RUNNING")?;
            strike(victim, &run.id)?;
        }
        Moment::Adding => {
            task.becomes("RUNNING")?;
            let exec = spawn(&["task", "exec", "--exec-id", "e", &run.id, "sleep", "1000"])?;
            std::thread::sleep(Duration::from_millis(700));
            strike(victim, &run.id)?;
            ended_badly(exec)?;
        }
        Moment::Paused => {
            task.becomes("RUNNING")?;
            task.call("pause")?;
            strike(victim, &run.id)?;
        }
        Moment::Killed => {
            task.becomes("RUNNING")?;
            run.kill("SIGKILL")?;
            // It may have ended already.
            let _ = strike(victim, &run.id);
        }
    }
    ended_badly(child)?;
    drop(task);
    forget_fifos()?;
    nothing_left(&before, CLEAN_UP)?;
    Ok((run.id, began))
}

/// `ctr` leaves its FIFOs if the task is gone already when it is to be deleted.
pub fn forget_fifos() -> Result<()> {
    for folder in std::fs::read_dir("/run/containerd/fifo")?.flatten() {
        std::fs::remove_dir_all(folder.path())?;
    }
    Ok(())
}

/// The same, but for those of a container that runs.
pub fn forget_fifos_but(id: &str) -> Result<()> {
    for folder in std::fs::read_dir("/run/containerd/fifo")?.flatten() {
        let files = std::fs::read_dir(folder.path())?.flatten();
        let of_it = format!("{id}-");
        if !files.into_iter().any(|file| file.file_name().to_string_lossy().starts_with(&of_it)) {
            std::fs::remove_dir_all(folder.path())?;
        }
    }
    Ok(())
}

/// Waits for a `ctr` that must say that it failed.
pub fn ended_badly(mut child: Child) -> Result<()> {
    drop(child.stdin.take());
    let ended = until("ctr ends", CLEAN_UP, || Ok(child.try_wait()?));
    if ended.is_err() {
        let _ = child.kill();
    }
    ended?;
    let finished = finish(child)?;
    ensure!(finished.code != 0, "{finished:?}");
    Ok(())
}

/// The guest's kernel panics: every process in it has ended, with a code that says so.
fn guest(runtime: Runtime) -> Result<()> {
    let before = Listing::now()?;
    let line = "sleep 2; echo c > /proc/sysrq-trigger; sleep 1000";
    let finished = Run::shell(runtime, line).flag("--privileged").finish()?;
    ensure!(finished.code == 255, "{finished:?}");
    nothing_left(&before, CLEAN_UP)
}
