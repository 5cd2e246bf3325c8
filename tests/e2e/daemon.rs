//! containerd is killed and comes again.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::client;
use husk_tests::containerd::{Run, Runtime, ctr, first_of, spawn};
use husk_tests::leftovers::Listing;
use husk_tests::processes::{Role, daemon, find, signal, words};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until, until_true};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::Case;
use crate::faults::forget_fifos;

pub const CASES: &[Case] = &[("daemon::killed_while_containers_run", while_containers_run)];

/// runc's shim, of Debian 12, is left behind when its daemon goes while a container is made.
pub const HUSK_CASES: &[Case] = &[("daemon::killed_at_any_moment", at_any_moment)];

/// containerd's command line, once it has been killed.
fn kill() -> Result<Vec<String>> {
    let pid = daemon().context("no containerd")?;
    let command = words(pid);
    signal(pid, Signal::SIGKILL)?;
    // The suite has taken the place of the script that started it.
    let _ = nix::sys::wait::waitpid(Pid::from_raw(i32::try_from(pid)?), None);
    Ok(command)
}

fn start(command: &[String]) -> Result<()> {
    let log = std::fs::File::options().append(true).open("/run/machine/containerd/log")?;
    std::process::Command::new("setsid")
        .args(command.iter().filter(|word| !word.is_empty()))
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    until_true("containerd comes again", PATIENCE, || Ok(client::answers()))
}

/// Kills containerd and starts it again after a while.
pub fn restart(away: Duration) -> Result<()> {
    let command = kill()?;
    std::thread::sleep(away);
    start(&command)
}

/// What a `ctr` does whose daemon is gone is its own affair. Mostly it ends; now and then it stays.
fn gives_up(mut client: Child) -> Result<()> {
    drop(client.stdin.take());
    let _ =
        until("ctr ends without its daemon", Duration::from_secs(10), || Ok(client.try_wait()?));
    let _ = client.kill();
    client.wait()?;
    Ok(())
}

/// As `nothing_left`, but the daemon has another number now.
fn nothing_left_but_the_daemon(before: &Listing) -> Result<()> {
    let mut added = Vec::new();
    let looked = until_true("all is as before", CLEAN_UP, || {
        added = Listing::now()?.added_since(before);
        Ok(added.iter().all(|line| line.contains(" containerd --config")))
    });
    looked.with_context(|| format!("left behind: {added:?}"))
}

/// What runs goes on, and its end is told to the new one.
fn while_containers_run(runtime: Runtime) -> Result<()> {
    // What the runtime's first container leaves for the later ones.
    first_of(runtime)?;
    let before = Listing::now()?;
    let line = "until [ -e /tmp/go ]; do sleep 0.1; done; exit 7";
    let task = Task::start(Run::shell(runtime, line))?;
    let gone = Task::start(Run::shell(runtime, "sleep 6; exit 5"))?;
    restart(Duration::from_secs(8))?;
    ensure!(task.shell("echo alive")? == "alive");
    // Nobody was there when it ended.
    gone.becomes("STOPPED")?;
    let _ = ctr(&["task", "delete", &gone.id]);
    task.shell("touch /tmp/go")?;
    task.becomes("STOPPED")?;
    drop((task, gone));
    nothing_left_but_the_daemon(&before)
}

/// While a container is made, while a process is added, and while the container is ended.
fn at_any_moment(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let before = Listing::now()?;
    for milliseconds in [100, 400, 1200] {
        let run = Run::new(runtime, &["sleep", "1000"]).keep();
        let child = run.spawn()?;
        let task = Task::running(&run.id);
        until("a shim", PATIENCE, || Ok(find(Role::Shim, &run.id)))?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        let command = kill()?;
        gives_up(child)?;
        start(&command)?;
        drop(task);
        let all = nothing_left_but_the_daemon(&before);
        all.with_context(|| format!("creating, {milliseconds} ms"))?;
    }
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]))?;
    let exec = spawn(&["task", "exec", "--exec-id", "e", &task.id, "sleep", "1000"])?;
    std::thread::sleep(Duration::from_millis(300));
    let command = kill()?;
    gives_up(exec)?;
    start(&command)?;
    ensure!(task.shell("echo alive")? == "alive");
    let ending = spawn(&["task", "delete", "--force", &task.id])?;
    std::thread::sleep(Duration::from_millis(100));
    let command = kill()?;
    gives_up(ending)?;
    start(&command)?;
    drop(task);
    forget_fifos()?;
    nothing_left_but_the_daemon(&before)
}
