//! A guest that has been taken over, beside one that has not.
//!
//! The attacks are the probe's (`tests/probe/src/attack`), in a privileged container. Whatever they do, the
//! host goes on, or that machine alone ends, with a reason that is reported. HUSK_ATTACK_SECONDS and
//! HUSK_SEED set how long and with which numbers.

use std::fs;
use std::io::Write;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::client::task_is;
use husk_tests::containerd::{Run, Runtime, ctr, finish, first_of, spawn};
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::processes::{Role, find, memory};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until, until_true};

use crate::Case;
use crate::alone::DropIn;
use crate::endurance::number;
use crate::faults::forget_fifos_but;
use crate::shared::Shared;

pub const HUSK_CASES_ALONE: &[Case] = &[
    ("attack::configuration_space", |runtime| by_hand(runtime, "configuration", &[])),
    ("attack::bars", |runtime| by_hand(runtime, "bars", &[])),
    ("attack::queues", |runtime| by_hand(runtime, "queues", &[])),
    ("attack::ports", |runtime| by_hand(runtime, "ports", &["reset", "powered off"])),
    ("attack::vsock_ports", vsock_ports),
    ("attack::vsock_streams", vsock_streams),
    ("attack::vsock_flood", |runtime| by_hand(runtime, "vsock-flood", &[])),
    ("attack::interrupts", |runtime| by_hand(runtime, "interrupts", &[])),
    ("attack::log", log),
    ("attack::output", output),
    ("attack::memory", all_memory),
];

/// What containerd and the shims log.
const LOG: &str = "/run/machine/containerd/log";
/// The guest's memory, as the machine has it by default.
const GUEST: u64 = 256 << 20;
/// What each process may have of the host's memory beside the guest's.
const MEMORY: u64 = 48 << 20;
/// Descriptors: one for each of a vsock's 1024 connections, and what the process has besides.
const DESCRIPTORS: usize = 1024 + 128;
const THREADS: usize = 64;
/// What an attacked sandbox may add to the log.
const LOGGED: u64 = 512 << 10;

/// How long an attack takes if nothing else is said.
const SECONDS: u64 = 5;

/// A sandbox beside those that are attacked, the same for all of them.
pub struct Other {
    task: Task,
    machine: u32,
}

/// Ends with the last attack.
pub static OTHER: Shared<Other> = Shared::new(|runtime| {
    let task = Task::start(Run::new(runtime, &["sleep", "100000"]))?;
    let machine = find(Role::Machine, &task.id).context("no machine")?;
    Ok(Other { task, machine })
});

/// The sandbox that is attacked, and the one beside it.
struct Beside {
    before: Listing,
    log: u64,
    attacked: Task,
    other: Arc<Other>,
    /// The attack is the probe's, which writes down how it went.
    says: bool,
    largest: [Use; 3],
}

/// What a process has.
#[derive(Debug, Default, Clone, Copy)]
struct Use {
    memory: u64,
    descriptors: usize,
    threads: usize,
}

/// How it came out for the attacked sandbox.
#[derive(Debug)]
enum Outcome {
    Answers,
    /// Its guest no longer has the devices by which it is reached; the machine runs.
    Silent,
    Ended(String),
}

impl Beside {
    fn start(runtime: Runtime, attacked: Run) -> Result<Self> {
        first_of(runtime)?;
        let other = OTHER.of(runtime)?;
        let before = Listing::now()?;
        let log = fs::metadata(LOG)?.len();
        let attacked = Task::start(attacked.flag("--privileged"))?;
        Ok(Self { before, log, attacked, other, says: true, largest: [Use::default(); 3] })
    }

    /// Looks at the host's side of the attacked sandbox for some time, or until it has ended.
    fn watch(&mut self, seconds: u64) -> Result<()> {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(700));
            for (role, largest) in Role::ALL.into_iter().zip(&mut self.largest) {
                let Some(pid) = find(role, &self.attacked.id) else { return Ok(()) };
                // It may end meanwhile.
                let Ok(seen) = uses(pid) else { return Ok(()) };
                largest.memory = largest.memory.max(seen.memory);
                largest.descriptors = largest.descriptors.max(seen.descriptors);
                largest.threads = largest.threads.max(seen.threads);
            }
        }
        Ok(())
    }

    fn added_to_log(&self) -> Result<String> {
        let log = fs::read(LOG)?;
        let from = usize::try_from(self.log)?;
        Ok(String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned())
    }

    fn outcome(&self) -> Result<Outcome> {
        let id = &self.attacked.id;
        let words = ["task", "exec", "--exec-id", "after", id, "echo", "here"];
        if task_is(id, "RUNNING") {
            let answer = within(spawn(&words)?, Duration::from_secs(15))?;
            if answer.is_some_and(|text| text == "here") {
                return Ok(Outcome::Answers);
            }
        }
        if task_is(id, "RUNNING") {
            return Ok(Outcome::Silent);
        }
        let log = self.added_to_log()?;
        let sandbox = format!("sandbox=\"{id}\"");
        let ended = log.lines().find(|l| l.contains("machine ended") && l.contains(&sandbox));
        let ended = ended.with_context(|| format!("no reason in {log}"))?;
        let reason = ended.split_once("reason=").context("no reason")?.1;
        Ok(Outcome::Ended(reason.replace(&sandbox, "").trim().to_owned()))
    }

    /// Everything that must hold afterwards. With `reasons` the machine must have ended by one of them.
    fn ends(self, reasons: &[&str]) -> Result<()> {
        let outcome = self.outcome()?;
        let [shim, machine, files] = self.largest;
        eprintln!("{outcome:?}; shim {shim:?}, machine {machine:?}, files {files:?}");
        if let (Outcome::Answers, true) = (&outcome, self.says) {
            // Else an attack that could not begin would pass for one that did nothing.
            let done = || Ok(self.attacked.shell("cat /tmp/said")?.contains("done"));
            until_true("the attack comes to its end", PATIENCE, done)?;
        }
        if let Outcome::Ended(reason) = &outcome {
            // Only what the guest itself can bring about.
            let own = ["panicked", "reset", "powered off", "triple fault", "agent broke"];
            let wanted = if reasons.is_empty() { &own[..] } else { reasons };
            ensure!(wanted.iter().any(|text| reason.contains(text)), "it ended: {reason}");
        } else {
            // In a long one the guest may take from itself what it would need to come to its end.
            let long = matches!(outcome, Outcome::Silent) && seconds()? > SECONDS;
            ensure!(reasons.is_empty() || long, "{outcome:?} instead of {reasons:?}");
        }
        for (name, seen) in ["shim", "machine", "files"].iter().zip(self.largest) {
            let within =
                seen.memory <= MEMORY && seen.descriptors <= DESCRIPTORS && seen.threads <= THREADS;
            ensure!(within, "the {name} had {seen:?}");
        }
        let other = &self.other;
        ensure!(other.task.shell("echo here")? == "here", "the other sandbox is silent");
        let now = find(Role::Machine, &other.task.id);
        ensure!(now == Some(other.machine), "the other machine is not the same");
        let Self { before, attacked, .. } = &self;
        let _ = ctr(&["task", "delete", "--force", &attacked.id]);
        ensure!(!task_is(&attacked.id, "RUNNING"), "it cannot be removed");
        ctr(&["container", "rm", &attacked.id])?;
        forget_fifos_but(&other.task.id)?;
        nothing_left(before, CLEAN_UP)?;
        let log = self.added_to_log()?;
        // A guest's own panic is called otherwise: "the guest kernel panicked".
        let ours = log.lines().find(|line| line.contains("panicked at"));
        ensure!(ours.is_none(), "{ours:?}");
        ensure!(u64::try_from(log.len())? <= LOGGED, "{} bytes of log", log.len());
        Ok(())
    }
}

fn uses(pid: u32) -> Result<Use> {
    Ok(Use {
        memory: memory(pid, GUEST / 2)?,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        threads: fs::read_dir(format!("/proc/{pid}/task"))?.count(),
    })
}

/// What a `ctr` prints, if it ends with 0 in time; it is ended otherwise.
fn within(mut child: Child, limit: Duration) -> Result<Option<String>> {
    drop(child.stdin.take());
    if until("ctr ends", limit, || Ok(child.try_wait()?)).is_err() {
        let _ = child.kill();
    }
    let finished = finish(child).ok();
    Ok(finished.and_then(|finished| finished.text(0).ok()))
}

fn seconds() -> Result<u64> {
    number("HUSK_ATTACK_SECONDS", SECONDS)
}

fn attacker(runtime: Runtime, name: &str) -> Result<Run> {
    attacker_of(runtime, name, number("HUSK_SEED", 1)?)
}

fn attacker_of(runtime: Runtime, name: &str, seed: u64) -> Result<Run> {
    let seconds = seconds()?;
    eprintln!("attack {name}: {seconds} s, HUSK_SEED={seed}");
    // Some of them end and leave their container; others end with the machine.
    let line = format!("/probe attack {name} {seconds} {seed} >/tmp/said 2>&1; sleep 100000");
    Run::shell(runtime, &line).with_probe()
}

fn by_hand(runtime: Runtime, name: &str, reasons: &[&str]) -> Result<()> {
    let (since, seconds) = (Instant::now(), seconds()?);
    // A guest that has ended itself before the time is up is followed by one with other numbers.
    for seed in number("HUSK_SEED", 1)?.. {
        let mut beside = Beside::start(runtime, attacker_of(runtime, name, seed)?)?;
        // One that ends its machine does so at its own end, and the watch ends with it.
        beside.watch(seconds + if reasons.is_empty() { 4 } else { 60 })?;
        beside.ends(reasons)?;
        if since.elapsed() > Duration::from_secs(seconds) {
            break;
        }
    }
    Ok(())
}

/// Nobody of the host's waits at any port, and no other machine can be reached.
fn vsock_ports(runtime: Runtime) -> Result<()> {
    let mut beside = Beside::start(runtime, attacker(runtime, "vsock-ports")?)?;
    beside.watch(seconds()? + 4)?;
    let said = beside.attacked.shell("cat /tmp/said")?;
    ensure!(said.contains("done") && !said.contains("answered"), "{said}");
    beside.ends(&[])
}

/// Root dials where streams of processes might come to, while there are execs: none of them notices.
fn vsock_streams(runtime: Runtime) -> Result<()> {
    let mut beside = Beside::start(runtime, attacker(runtime, "vsock-streams")?)?;
    let (since, mut execs) = (Instant::now(), 0);
    while since.elapsed() < Duration::from_secs(seconds()?) {
        let (id, line) = (&beside.attacked.id, "read line; echo $line; echo err >&2; exit 7");
        let name = format!("beside-{execs}");
        let mut exec = spawn(&["task", "exec", "--exec-id", &name, id, "sh", "-c", line])?;
        // Open to the end: `ctr` forgets to close an input that ends before the exec is there.
        let mut input = exec.stdin.take().context("no stdin")?;
        input.write_all(b"in\n")?;
        let finished = finish(exec)?;
        drop(input);
        let said = (finished.text(7)?, finished.stderr.as_str());
        ensure!(said == ("in".to_owned(), "err\n"), "{said:?}");
        execs += 1;
    }
    eprintln!("{execs} execs");
    beside.watch(4)?;
    let said = beside.attacked.shell("cat /tmp/said")?;
    ensure!(said.contains("done") && !said.contains("answered"), "{said}");
    beside.ends(&[])
}

/// With a console, so that all of it reaches the host.
fn log(runtime: Runtime) -> Result<()> {
    let run = attacker(runtime, "log")?.flag("--annotation=io.husk.console=true");
    let mut beside = Beside::start(runtime, run)?;
    beside.watch(seconds()? + 4)?;
    beside.ends(&[])
}

/// Output that nobody reads, and output that never ends.
fn output(runtime: Runtime) -> Result<()> {
    let run = Run::new(runtime, &["sleep", "100000"]);
    let mut beside = Beside::start(runtime, run)?;
    beside.says = false;
    let exec = |name: &str| {
        spawn(&["task", "exec", "--exec-id", name, &beside.attacked.id, "yes", "flood"])
    };
    let unread = ["one", "two", "three"].into_iter().map(exec).collect::<Result<Vec<_>>>()?;
    let mut read = exec("read")?;
    let mut stdout = read.stdout.take().context("no stdout")?;
    let reader = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    beside.watch(seconds()?)?;
    for mut child in unread.into_iter().chain([read]) {
        let _ = child.kill();
        child.wait()?;
    }
    let _ = reader.join();
    beside.ends(&[])
}

/// All of it, and more by way of the device that adds memory: the machine is never larger than it may be.
fn all_memory(runtime: Runtime) -> Result<()> {
    let _room = DropIn::new("[machine]\nmax_memory = \"1GiB\"\n")?;
    let mut beside = Beside::start(runtime, attacker(runtime, "memory")?)?;
    let machine = find(Role::Machine, &beside.attacked.id).context("no machine")?;
    beside.watch(seconds()? + 4)?;
    let text = fs::read_to_string(format!("/proc/{machine}/status"))?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    let most: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    eprintln!("the machine had at most {} MiB", most >> 10);
    ensure!(most << 10 <= GUEST + MEMORY, "{} MiB", most >> 10);
    beside.ends(&[])
}
