//! The parity suite: each case runs on runc and on Husk, with the same expectation.
//!
//! Runs in the test machine (or on a host with a usable /dev/kvm), where containerd is up, the
//! images are imported and `HUSK_PROBE` names the static probe. First the cases that may run side
//! by side, then, one after the other, those that look at the whole machine.

mod alone;
mod attack;
mod changes;
mod daemon;
mod docker;
mod endurance;
mod exit;
mod faults;
mod files;
mod hooks;
mod host;
mod kubelet;
mod laid;
mod mesh;
mod mounts;
mod network;
mod pods;
mod process;
mod programs;
mod shared;
mod shell;
mod silent;
mod stdio;
mod task;
mod terminal;
mod traffic;
mod userland;
mod versions;
mod volumes;
mod within;

use std::io::Write;
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
fn twice(
    name: &str,
    runtime: Runtime,
    check: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Err(error) = check() else { return Ok(()) };
    // The runner prints it again at its end, if it comes to that.
    eprintln!("failed: {name}: {error:#}");
    if SECOND_TRIES.fetch_sub(1, Ordering::Relaxed) <= 0 {
        return Err(error);
    }
    // What it shares with others may be what is at fault.
    shared::end(runtime);
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
                let result = twice(&row, runtime, || check(runtime));
                took(row, since.elapsed());
                result.map_err(|error| format!("{error:#}").into())
            }));
        }
    }
    trials
}

/// Prints how long a row took, and keeps it for [`print_times`].
fn took(row: String, time: Duration) {
    // In one piece: the runner writes its own lines meanwhile.
    let line = format!("time: {row} {:.1}\n", time.as_secs_f32());
    let _ = std::io::stderr().write_all(line.as_bytes());
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

/// Rows that one machine does, because they share containers or because there is one only.
struct Group {
    /// How long they take on either runtime, roughly, as `time:` lines tell, where two run side by side.
    seconds: u32,
    cases: Vec<Case>,
    runtimes: &'static [Runtime],
    /// Whether other rows may run beside them.
    beside: bool,
}

const BOTH: &[Runtime] = &[Runtime::Runc, Runtime::Husk];
const HUSK: &[Runtime] = &[Runtime::Husk];

/// All rows, in the order in which they run.
fn groups() -> Vec<Group> {
    let group = |seconds, cases: &[&[Case]], runtimes, beside| Group {
        seconds,
        cases: cases.concat(),
        runtimes,
        beside,
    };
    // Rows that share nothing: each can go to any machine.
    let each = |seconds, cases: &'static [Case], runtimes, beside| {
        cases.iter().map(move |case| Group { seconds, cases: vec![*case], runtimes, beside })
    };
    let mut groups = vec![
        group(
            420,
            &[
                files::CASES,
                stdio::CASES,
                process::CASES,
                mounts::CASES,
                changes::CASES,
                host::CASES,
            ],
            BOTH,
            true,
        ),
        // Those for which the large image is imported.
        group(300, &[network::CASES, mesh::CASES, traffic::CASES, userland::CASES], BOTH, true),
        group(250, &[pods::CASES, volumes::CASES, kubelet::CASES], BOTH, true),
        group(190, &[task::CASES, within::CASES, terminal::CASES], BOTH, true),
        group(40, &[alone::HUSK_CASES_BESIDE], HUSK, true),
    ];
    groups.extend(each(12, exit::CASES, BOTH, true));
    groups.extend(each(12, hooks::CASES, BOTH, true));
    groups.extend(each(20, endurance::HUSK_CASES, HUSK, true));
    if std::env::var_os("HUSK_PROGRAMS").is_some_and(|set| !set.is_empty()) {
        groups.extend(each(120, programs::CASES, BOTH, true));
    }
    groups.extend(each(50, alone::CASES, BOTH, false));
    groups.extend(each(40, daemon::CASES, BOTH, false));
    groups.extend(each(50, faults::HUSK_CASES, HUSK, false));
    groups.extend(each(90, silent::HUSK_CASES, HUSK, false));
    groups.extend(each(20, network::HUSK_CASES, HUSK, false));
    groups.extend(each(30, daemon::HUSK_CASES, HUSK, false));
    groups.extend(each(10, alone::HUSK_CASES, HUSK, false));
    groups.extend(each(12, shell::HUSK_CASES, HUSK, false));
    groups.extend(each(40, endurance::HUSK_CASES_ALONE, HUSK, false));
    // Last: the sandbox that is not attacked stays until the end.
    groups.push(group(160, &[attack::HUSK_CASES_ALONE], HUSK, false));
    groups
}

/// Seconds that each machine needs afterwards, for the rows of other engines: `tests/e2e/run` says which.
const AFTERWARDS: [u32; 2] = [300, 150];

/// The part of all rows that this run is to do: with `HUSK_SHARE=1/2` about half of them, for a second
/// machine that does `2/2`.
fn share(groups: Vec<Group>) -> anyhow::Result<Vec<Group>> {
    let share = std::env::var("HUSK_SHARE").unwrap_or_else(|_| "1/1".to_owned());
    let (number, of) = share.split_once('/').context("HUSK_SHARE should be like 1/2")?;
    let (number, of) = (number.parse::<usize>()?, of.parse::<usize>()?);
    ensure!((1..=of).contains(&number), "HUSK_SHARE should be like 1/2");
    Ok(deal(groups, of).swap_remove(number - 1))
}

/// Deals the groups to so many machines: the longest first, each to the one that has least to do; the order
/// in each machine is that of the groups.
fn deal(groups: Vec<Group>, machines: usize) -> Vec<Vec<Group>> {
    let mut loads: Vec<u32> =
        (0..machines).map(|number| AFTERWARDS.get(number).copied().unwrap_or(0)).collect();
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(groups[*index].seconds));
    let mut machine_of = vec![0; groups.len()];
    for index in order {
        let least = (0..machines).min_by_key(|machine| loads[*machine]).unwrap_or(0);
        loads[least] += groups[index].seconds;
        machine_of[index] = least;
    }
    let mut dealt: Vec<Vec<Group>> = (0..machines).map(|_| Vec::new()).collect();
    for (group, machine) in groups.into_iter().zip(machine_of) {
        dealt[machine].push(group);
    }
    dealt
}

/// Ends what rows have shared.
fn end_shared() {
    std::thread::scope(|scope| {
        for runtime in [Runtime::Runc, Runtime::Husk, Runtime::HuskSandbox] {
            scope.spawn(move || shared::end(runtime));
        }
    });
}

fn main() -> anyhow::Result<()> {
    let since = Instant::now();
    let mut arguments = Arguments::from_args();
    if let Some(folder) = versions::folder() {
        return versions::run(&folder, arguments);
    }
    if docker::wanted() {
        return docker::run(&arguments);
    }
    let (beside, alone): (Vec<_>, Vec<_>) =
        share(groups())?.into_iter().partition(|group| group.beside);
    let of = |groups: Vec<Group>| {
        groups.into_iter().flat_map(|group| trials(&group.cases, group.runtimes)).collect()
    };
    let first = libtest_mimic::run(&arguments, of(beside));
    end_shared();
    arguments.test_threads = Some(1);
    let second = libtest_mimic::run(&arguments, of(alone));
    end_shared();
    print_times(since);
    if first.has_failed() || second.has_failed() {
        std::process::exit(101);
    }
    Ok(())
}
