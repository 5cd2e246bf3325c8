//! The parity suite: each case runs on runc and on Husk, with the same expectation.
//!
//! Runs in the test machine (or on a host with a usable /dev/kvm), where containerd is up, the
//! images are imported and `HUSK_PROBE` names the static probe. First the cases that may run side
//! by side, then, one after the other, those that look at the whole machine.

mod alone;
mod attack;
mod daemon;
mod docker;
mod endurance;
mod exit;
mod faults;
mod files;
mod hooks;
mod mounts;
mod network;
mod pods;
mod process;
mod programs;
mod shell;
mod stdio;
mod task;
mod terminal;
mod traffic;
mod userland;
mod versions;
mod within;

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use husk_tests::containerd::Runtime;
use libtest_mimic::{Arguments, Trial};

/// How many of the slowest rows are listed at the end of a run.
const SLOWEST: usize = 20;

/// How long each row of this run took, its second try included.
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// One row: a name and what must hold on the given runtime.
type Case = (&'static str, fn(Runtime) -> anyhow::Result<()>);

/// How many rows of one run may have a second try.
static SECOND_TRIES: AtomicI32 = AtomicI32::new(2);

/// Does `check`, and does it again if it failed: on an emulated processor of a busy host a row may fail
/// for want of time. It is said aloud, and counted by `.ci/run`; and where several rows fail it is not that.
fn twice(name: &str, check: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let Err(error) = check() else { return Ok(()) };
    // The runner prints it again at its end, if it comes to that.
    eprintln!("failed: {name}: {error:#}");
    if SECOND_TRIES.fetch_sub(1, Ordering::Relaxed) <= 0 {
        return Err(error);
    }
    check().inspect_err(|error| eprintln!("failed: {name}, tried again: {error:#}"))?;
    eprintln!("unsteady: {name} passed when it was tried again");
    Ok(())
}

fn trials(cases: &[Case], runtimes: &[Runtime]) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in cases {
        for runtime in runtimes {
            let (name, check, runtime) = (*name, *check, *runtime);
            trials.push(Trial::test(format!("{}::{name}", runtime.name()), move || {
                let row = format!("{}::{name}", runtime.name());
                let since = Instant::now();
                let result = twice(&row, || check(runtime));
                took(row, since.elapsed());
                result.map_err(|error| format!("{error:#}").into())
            }));
        }
    }
    trials
}

/// Prints how long a row took, and keeps it for [`print_times`].
fn took(row: String, time: Duration) {
    eprintln!("time: {row} {:.1}", time.as_secs_f32());
    if let Ok(mut times) = TIMES.lock() {
        times.push((time, row));
    }
}

/// Prints the slowest rows of this run, and how long all of them took together.
fn print_times(since: Instant) {
    let Ok(mut times) = TIMES.lock() else { return };
    times.sort_by(|one, other| other.cmp(one));
    for (time, row) in times.iter().take(SLOWEST) {
        eprintln!("slow: {row} took {:.1} s", time.as_secs_f32());
    }
    let sum: Duration = times.iter().map(|(time, _)| *time).sum();
    eprintln!(
        "times: {} rows took {:.0} s together, within {:.0} s",
        times.len(),
        sum.as_secs_f32(),
        since.elapsed().as_secs_f32()
    );
}

/// The part of all cases that this run is to do: with `HUSK_SHARE=1/2` every other one, for a second
/// machine that does `2/2`.
fn share(cases: &[&[Case]]) -> anyhow::Result<Vec<Case>> {
    let share = std::env::var("HUSK_SHARE").unwrap_or_else(|_| "1/1".to_owned());
    let (number, of) = share.split_once('/').context("HUSK_SHARE should be like 1/2")?;
    let (number, of) = (number.parse::<usize>()?, of.parse::<usize>()?);
    ensure!((1..=of).contains(&number), "HUSK_SHARE should be like 1/2");
    Ok(cases.concat().into_iter().skip(number - 1).step_by(of).collect())
}

fn main() -> anyhow::Result<()> {
    let since = Instant::now();
    let both = [Runtime::Runc, Runtime::Husk];
    let mut arguments = Arguments::from_args();
    if let Some(folder) = versions::folder() {
        return versions::run(&folder, arguments);
    }
    if docker::wanted() {
        return docker::run(&arguments);
    }
    let side_by_side = share(&[
        exit::CASES,
        stdio::CASES,
        process::CASES,
        mounts::CASES,
        files::CASES,
        userland::CASES,
        task::CASES,
        terminal::CASES,
        pods::CASES,
        hooks::CASES,
        network::CASES,
        traffic::CASES,
        if std::env::var_os("HUSK_PROGRAMS").is_some_and(|set| !set.is_empty()) {
            programs::CASES
        } else {
            &[]
        },
        within::CASES,
    ])?;
    let mut first = trials(&side_by_side, &both);
    first.extend(trials(&share(&[endurance::HUSK_CASES])?, &[Runtime::Husk]));
    let first = libtest_mimic::run(&arguments, first);
    within::end();
    arguments.test_threads = Some(1);
    let mut last = trials(&share(&[alone::CASES, daemon::CASES])?, &both);
    let husk = share(&[
        faults::HUSK_CASES,
        network::HUSK_CASES,
        daemon::HUSK_CASES,
        alone::HUSK_CASES,
        shell::HUSK_CASES,
        endurance::HUSK_CASES_ALONE,
        attack::HUSK_CASES_ALONE,
    ])?;
    last.extend(trials(&husk, &[Runtime::Husk]));
    let second = libtest_mimic::run(&arguments, last);
    print_times(since);
    if first.has_failed() || second.has_failed() {
        std::process::exit(101);
    }
    Ok(())
}
