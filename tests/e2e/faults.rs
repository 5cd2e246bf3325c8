//! What happens when one of Husk's processes is killed: the container's end is told once, and nothing is
//! left behind.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_tests::containerd::{Run, Runtime, ctr, finish, spawn, task_is};
use husk_tests::events::Events;
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::task::Task;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Case;

pub const HUSK_CASES: &[Case] = &[
    ("faults::shim", |_| at_every_moment(Victim::Shim)),
    ("faults::machine", |_| at_every_moment(Victim::Machine)),
    ("faults::file_server", |_| at_every_moment(Victim::Files)),
    ("faults::guest", guest),
    ("faults::containerd", containerd),
];

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Shim,
    Machine,
    Files,
}

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

fn children(pid: u32) -> Vec<u32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    listed.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn words(pid: u32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn find(victim: Victim, id: &str) -> Option<u32> {
    let all = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    let is_shim = |pid: &u32| {
        let words = words(*pid);
        // Not the one that `start` or `delete` was called on.
        words[0].ends_with("containerd-shim-husk-v2")
            && words.windows(2).any(|pair| pair[0] == "-id" && pair[1] == id)
            && words.iter().any(|word| word == "-socket")
    };
    let shim = pids.into_iter().find(is_shim)?;
    let role = match victim {
        Victim::Shim => return Some(shim),
        Victim::Machine => "machine",
        Victim::Files => "files",
    };
    children(shim).into_iter().find(|pid| words(*pid).get(1).is_some_and(|word| word == role))
}

fn strike(victim: Victim, id: &str) -> Result<()> {
    let since = Instant::now();
    loop {
        if let Some(pid) = find(victim, id) {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
            return Ok(());
        }
        ensure!(since.elapsed() < PATIENCE, "there is no {victim:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn at_every_moment(victim: Victim) -> Result<()> {
    Run::new(Runtime::Husk, &["true"]).finish()?.text(0)?;
    for moment in MOMENTS {
        at(victim, moment).with_context(|| format!("{victim:?} {moment:?}"))?;
    }
    // Whoever comes next finds everything in order.
    Run::new(Runtime::Husk, &["true"]).finish()?.text(0).map(drop)
}

fn at(victim: Victim, moment: Moment) -> Result<()> {
    let mut events = Events::follow()?;
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
            let since = Instant::now();
            while find(victim, &run.id).is_none() && since.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
            }
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
    nothing_left(&before, PATIENCE)?;
    let seen = events.within(&run.id, Duration::from_secs(1));
    let exits = seen.iter().filter(|topic| *topic == "/tasks/exit").count();
    let wanted = if matches!(moment, Moment::Adding) { 1..=2 } else { 1..=1 };
    ensure!(!began || wanted.contains(&exits), "{exits} exits in {seen:?}");
    Ok(())
}

/// `ctr` leaves its FIFOs if the task is gone already when it is to be deleted.
fn forget_fifos() -> Result<()> {
    for folder in std::fs::read_dir("/run/containerd/fifo")?.flatten() {
        std::fs::remove_dir_all(folder.path())?;
    }
    Ok(())
}

fn ended_badly(mut child: Child) -> Result<()> {
    let since = Instant::now();
    drop(child.stdin.take());
    while child.try_wait()?.is_none() {
        if since.elapsed() > PATIENCE {
            let _ = child.kill();
            bail!("ctr does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
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
    nothing_left(&before, PATIENCE)
}

/// containerd is killed and comes again: what runs goes on, and its end is told to the new one.
fn containerd(runtime: Runtime) -> Result<()> {
    let before = Listing::now()?;
    let line = "until [ -e /tmp/go ]; do sleep 0.1; done; exit 7";
    let task = Task::start(Run::shell(runtime, line))?;
    let gone = Task::start(Run::shell(runtime, "sleep 6; exit 5"))?;
    let all = std::fs::read_dir("/proc")?.flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    let daemon = |pid: &u32| words(*pid)[0] == "containerd";
    let pid = pids.into_iter().find(daemon).context("no containerd")?;
    let command = words(pid);
    let daemon = Pid::from_raw(i32::try_from(pid)?);
    kill(daemon, Signal::SIGKILL)?;
    // The suite has taken the place of the script that started it.
    let _ = nix::sys::wait::waitpid(daemon, None);
    std::thread::sleep(Duration::from_secs(8));
    let log = std::fs::File::options().append(true).open("/run/machine/containerd/log")?;
    std::process::Command::new("setsid")
        .args(command.iter().filter(|word| !word.is_empty()))
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let since = Instant::now();
    while ctr(&["version"]).is_err() {
        ensure!(since.elapsed() < Duration::from_secs(60), "containerd does not come again");
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(task.shell("echo alive")? == "alive");
    // Nobody was there when it ended.
    gone.becomes("STOPPED")?;
    let code = |id: &str| -> Result<String> { ctr(&["task", "delete", id]) };
    drop(code(&gone.id));
    task.shell("touch /tmp/go")?;
    task.becomes("STOPPED")?;
    drop((task, gone));
    // The daemon itself has another number now.
    let since = Instant::now();
    loop {
        let added = Listing::now()?.added_since(&before);
        if added.iter().all(|line| line.contains(" containerd --config")) {
            return Ok(());
        }
        ensure!(since.elapsed() < PATIENCE, "left behind: {added:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
