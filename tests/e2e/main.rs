//! The parity suite: each case runs on runc and on Husk, with the same expectation.
//!
//! Runs in the test machine (or on a host with a usable /dev/kvm), where containerd is up, the
//! images are imported and `HUSK_PROBE` names the static probe. First the cases that may run side
//! by side, then, one after the other, those that look at the whole machine.

mod alone;
mod exit;
mod files;
mod mounts;
mod process;
mod stdio;
mod userland;

use husk_tests::containerd::Runtime;
use libtest_mimic::{Arguments, Trial};

/// One row: a name and what must hold on the given runtime.
type Case = (&'static str, fn(Runtime) -> anyhow::Result<()>);

fn trials(cases: &[Case], runtimes: &[Runtime]) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in cases {
        for runtime in runtimes {
            let (name, check, runtime) = (*name, *check, *runtime);
            trials.push(Trial::test(format!("{}::{name}", runtime.name()), move || {
                // The emulated machine stalls under load, on runc as on Husk: a case that fails is
                // run once more, and its first error printed at once so that it is not lost.
                check(runtime).or_else(|error| {
                    eprintln!("again: {}::{name}: {error:#}", runtime.name());
                    check(runtime).map_err(|error| format!("{error:#}").into())
                })
            }));
        }
    }
    trials
}

fn main() {
    let both = [Runtime::Runc, Runtime::Husk];
    let mut arguments = Arguments::from_args();
    let side_by_side =
        [exit::CASES, stdio::CASES, process::CASES, mounts::CASES, files::CASES, userland::CASES]
            .concat();
    let first = libtest_mimic::run(&arguments, trials(&side_by_side, &both));
    arguments.test_threads = Some(1);
    let mut last = trials(alone::CASES, &both);
    last.extend(trials(alone::HUSK_CASES, &[Runtime::Husk]));
    let second = libtest_mimic::run(&arguments, last);
    if first.has_failed() || second.has_failed() {
        std::process::exit(101);
    }
}
