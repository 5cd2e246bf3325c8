//! Much at once, and much in a row.
//!
//! The numbers are those of a suite that is run often; HUSK_AT_ONCE, HUSK_CYCLES, HUSK_EXECS, HUSK_FILES,
//! HUSK_IN_A_ROW and HUSK_OUTPUT set others.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Finished, Run, Runtime, ctr, finish, first_of, spawn};
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::processes::{Role, find, memory, signal};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until_true};
use nix::sys::signal::Signal;

use crate::Case;
use crate::alone::DropIn;
use crate::faults::{ended_badly, forget_fifos, strike};
use crate::shell::in_guest;

/// Those that look at nothing but their own sandbox.
pub const HUSK_CASES: &[Case] = &[("endurance::a_guest_that_stands_still", stands_still)];

/// Those that look at the whole machine.
pub const HUSK_CASES_ALONE: &[Case] = &[
    ("endurance::cycles_with_random_kills", cycles),
    ("endurance::many_at_once", many_at_once),
    ("endurance::execs_leave_nothing", execs),
];

/// A number that the environment sets.
pub fn number(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().with_context(|| name.to_owned()),
        _ => Ok(default),
    }
}

/// The same numbers in each run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn index(&mut self, limit: u8) -> usize {
        // No larger than a u8.
        usize::try_from(self.below(limit.into())).unwrap_or(0)
    }
}

/// Containers come and go, and in most of them something is killed on the way.
fn cycles(runtime: Runtime) -> Result<()> {
    let (count, seed) = (number("HUSK_CYCLES", 8)?, number("HUSK_SEED", 1)?);
    eprintln!("{count} cycles, HUSK_SEED={seed}");
    first_of(runtime)?;
    let before = Listing::now()?;
    let mut numbers = Numbers(seed);
    for cycle in 0..count {
        let victim = Role::ALL.into_iter().nth(numbers.index(4));
        let milliseconds = numbers.below(2500);
        one_cycle(runtime, victim, milliseconds)
            .and_then(|()| nothing_left(&before, CLEAN_UP))
            .with_context(|| format!("cycle {cycle}: {victim:?} after {milliseconds} ms"))?;
    }
    Run::new(runtime, &["true"]).finish()?.text(0).map(drop)
}

fn one_cycle(runtime: Runtime, victim: Option<Role>, milliseconds: u64) -> Result<()> {
    let run = Run::new(runtime, &["sleep", "1000"]).keep();
    let child = run.spawn()?;
    let task = Task::running(&run.id);
    std::thread::sleep(Duration::from_millis(milliseconds));
    match victim {
        Some(role) => strike(role, &run.id)?,
        None => {
            task.becomes("RUNNING")?;
            run.kill("SIGKILL")?;
        }
    }
    ended_badly(child)?;
    drop(task);
    forget_fifos()
}

/// Does one thing for each id at the same time.
fn at_once(ids: &[String], words: impl Fn(&str) -> Vec<String>) -> Result<Vec<Finished>> {
    let started: Vec<_> = ids
        .iter()
        .map(|id| {
            let words = words(id);
            let mut child = spawn(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
            drop(child.stdin.take());
            Ok(child)
        })
        .collect::<Result<_>>()?;
    started.into_iter().map(finish).collect()
}

fn many_at_once(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let count = number("HUSK_AT_ONCE", 10)?;
    // All these guests boot on the one processor that the machines of this suite have.
    let _patient = DropIn::new("[machine]\nstart_timeout = 600\nmemory = \"64MiB\"\n")?;
    let before = Listing::now()?;
    let ids: Vec<_> = (0..count).map(|number| format!("at-once-{number}")).collect();
    let all = |words: &[&str], after: &[&str]| {
        let (words, after) = (words.to_vec(), after.to_vec());
        at_once(&ids, move |id| {
            [&words[..], &[id], &after].concat().into_iter().map(str::to_owned).collect()
        })
    };
    let run = ["run", "--detach", "--runtime", runtime.shim(), husk_tests::containerd::BUSYBOX];
    for finished in all(&run, &["sleep", "1000"])? {
        finished.text(0)?;
    }
    let listed = ctr(&["task", "ls", "--quiet"])?;
    ensure!(ids.iter().all(|id| listed.lines().any(|line| line == id)), "{listed}");
    for finished in all(&["task", "exec", "--exec-id", "e"], &["echo", "here"])? {
        ensure!(finished.text(0)? == "here");
    }
    let deleted = all(&["task", "delete", "--force"], &[])?;
    let removed = all(&["container", "rm"], &[])?;
    for finished in deleted.iter().chain(&removed) {
        // 137 is the container's: `ctr task delete` passes it on.
        ensure!([0, 137].contains(&finished.code), "{finished:?}");
    }
    forget_fifos()?;
    nothing_left(&before, CLEAN_UP)
}

/// What the shim, the machine, the file server and the agent have in memory.
fn uses(id: &str) -> Result<[u64; 4]> {
    let mut uses = [0; 4];
    for (bytes, role) in uses.iter_mut().zip(Role::ALL) {
        *bytes = memory(find(role, id).with_context(|| format!("no {role:?}"))?, 128 << 20)?;
    }
    let line = "awk '/^RssAnon/ { print $2 }' /proc/1/status";
    uses[3] = in_guest(id, line)?.text(0)?.parse::<u64>()? << 10;
    Ok(uses)
}

fn execs(runtime: Runtime) -> Result<()> {
    let count = number("HUSK_EXECS", 10)?;
    let _allowed = DropIn::new("[guest]\ndebug_shell = true\n")?;
    let task = Task::start(Run::new(runtime, &["sleep", "100000"]))?;
    let add = |count: u64| -> Result<()> {
        for number in 0..count {
            let text = task.exec(&["echo", &number.to_string()])?.text(0)?;
            ensure!(text == number.to_string(), "{text} instead of {number}");
        }
        Ok(())
    };
    // What is made once and stays.
    add(10)?;
    let before = uses(&task.id)?;
    add(count)?;
    let after = uses(&task.id)?;
    eprintln!(
        "{count} execs: shim, machine, files, agent had {before:?} bytes, and have {after:?}"
    );
    for (name, (before, after)) in
        ["shim", "machine", "files", "agent"].iter().zip(before.iter().zip(after))
    {
        let grown = after.saturating_sub(*before);
        ensure!(grown <= 1 << 20, "the {name} has grown by {} KiB", grown >> 10);
    }
    Ok(())
}

/// A machine that gets no time at all is slow, not dead.
fn stands_still(runtime: Runtime) -> Result<()> {
    let task = Task::start(Run::shell(runtime, "sleep 1000; exit 3"))?;
    let machine = find(Role::Machine, &task.id).context("no machine")?;
    signal(machine, Signal::SIGSTOP)?;
    let exec = spawn(&["task", "exec", "--exec-id", "slow", &task.id, "echo", "late"])?;
    std::thread::sleep(Duration::from_secs(30));
    signal(machine, Signal::SIGCONT)?;
    ensure!(finish(exec)?.text(0)? == "late");
    until_true("it goes on", PATIENCE, || Ok(task.shell("echo alive")? == "alive"))?;
    ensure!(find(Role::Machine, &task.id) == Some(machine), "it is another machine");
    task.metrics().map(drop)
}
