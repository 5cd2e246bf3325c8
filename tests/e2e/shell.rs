//! `husk exec`: a shell in the guest itself; and what one can do with it.

use std::process::Command;

use anyhow::{Result, ensure};
use husk_tests::client::task_is;
use husk_tests::containerd::{Finished, Run, Runtime, finish, first_of, start};
use husk_tests::events::Events;
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::task::Task;
use husk_tests::terminal::Terminal;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until_true};

use crate::Case;
use crate::alone::DropIn;

pub const HUSK_CASES: &[Case] = &[
    ("shell::in_the_guest", in_the_guest),
    ("shell::not_allowed", not_allowed),
    ("shell::ends_a_containers_init", ends_init),
    ("shell::ends_the_agent", ends_agent),
];

const ALLOWED: &str = "[guest]\ndebug_shell = true\n";

/// Runs a shell line in the guest of a sandbox.
pub fn in_guest(sandbox: &str, line: &str) -> Result<Finished> {
    let mut child = start(Command::new("husk").args(["exec", sandbox, "sh", "-c", line]))?;
    drop(child.stdin.take());
    finish(child)
}

/// With pipes and with a terminal; nothing of it is left, whether it ends or is given up.
fn in_the_guest(runtime: Runtime) -> Result<()> {
    let _allowed = DropIn::new(ALLOWED)?;
    first_of(runtime)?;
    let whole = Listing::now()?;
    let task = Task::start(Run::new(runtime, &["sleep", "4242"]))?;
    let before = Listing::now()?;
    let line = "cat; echo err >&2; ps | grep -c '[s]leep 4242'; cat /proc/1/comm; exit 7";
    let mut child = start(Command::new("husk").args(["exec", &task.id, "sh", "-c", line]))?;
    if let Some(mut input) = child.stdin.take() {
        std::io::Write::write_all(&mut input, b"in\n")?;
    }
    let finished = finish(child)?;
    // The kernel calls the agent by the file that it was.
    ensure!(finished.text(7)? == "in\n1\ninit", "{finished:?}");
    ensure!(finished.stderr == "err\n", "{finished:?}");
    let large = in_guest(&task.id, "head -c 5000000 /dev/zero")?;
    ensure!(large.code == 0 && large.stdout.len() == 5_000_000, "{} bytes", large.stdout.len());
    let missing = start(Command::new("husk").args(["exec", &task.id, "--", "no-such-applet"]))?;
    ensure!(finish(missing)?.code == 127);

    let mut terminal = Terminal::start_as("husk", &["exec", &task.id], 33, 77)?;
    terminal.types("tty; stty size\n")?;
    terminal.shows("/dev/pts/")?;
    terminal.shows("33 77\n")?;
    terminal.resize(44, 88)?;
    terminal.types("until [ \"$(stty size)\" = '44 88' ]; do sleep 0.1; done; exit 9\n")?;
    ensure!(terminal.ends()? == 9);

    // One that is given up ends in the guest as well.
    let mut child = start(Command::new("husk").args(["exec", &task.id, "sleep", "5353"]))?;
    let looks = || Ok(in_guest(&task.id, "ps | grep -c '[s]leep 5353'")?.stdout == b"1\n");
    until_true("it runs", PATIENCE, looks)?;
    child.kill()?;
    child.wait()?;
    let gone = || Ok(in_guest(&task.id, "ps | grep -c '[s]leep 5353'")?.stdout == b"0\n");
    until_true("it has ended", CLEAN_UP, gone)?;
    let left = in_guest(&task.id, "ls /run/husk-agent; ls -d /sys/fs/cgroup/shell-* | wc -l")?;
    // The one that looks.
    ensure!(left.stdout.ends_with(b"1\n"), "{left:?}");
    nothing_left(&before, CLEAN_UP)?;
    drop(task);
    nothing_left(&whole, CLEAN_UP)
}

fn not_allowed(runtime: Runtime) -> Result<()> {
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]))?;
    let refused = in_guest(&task.id, "true")?;
    let named = refused.stderr.contains("guest.debug_shell = true");
    ensure!(refused.code == 1 && named, "{refused:?}");
    let unknown = in_guest("no-such-sandbox", "true")?;
    ensure!(unknown.code == 1 && unknown.stderr.contains("husk ps"), "{unknown:?}");
    Ok(())
}

/// Killed from outside, as the host's root can do under runc.
fn ends_init(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let _allowed = DropIn::new(ALLOWED)?;
    let before = Listing::now()?;
    let mut events = Events::follow()?;
    let run = Run::new(runtime, &["sleep", "4242"]);
    let child = run.spawn_running()?;
    let line = "kill -9 $(ps | awk '/[s]leep 4242/ { print $1 }')";
    in_guest(&run.id, line)?.text(0)?;
    finish(child)?.text(137)?;
    let seen = events.until(&run.id, "/tasks/delete")?;
    ensure!(seen.iter().filter(|topic| *topic == "/tasks/exit").count() == 1, "{seen:?}");
    drop(events);
    nothing_left(&before, CLEAN_UP)
}

/// Nobody in a guest can kill its first process, so it is made to fail: its code is overwritten. The
/// kernel does not live on without it.
fn ends_agent(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let _allowed = DropIn::new(ALLOWED)?;
    let before = Listing::now()?;
    let run = Run::new(runtime, &["sleep", "1000"]);
    let child = run.spawn_running()?;
    let line = "while read range mode rest; do [ $mode = r-xp ] && break; done < /proc/1/maps; \
                from=${range%-*}; to=${range#*-}; \
                count=$(((0x$to - 0x$from) / 4096)); echo $count; \
                dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x$from / 4096)) count=$count conv=notrunc; \
                sleep 1000";
    let lost = in_guest(&run.id, line)?;
    // Husk's own command fails, with what became of the machine.
    ensure!(lost.code == 1 && lost.stderr.contains("panicked"), "{lost:?}");
    finish(child)?.text(255)?;
    ensure!(!task_is(&run.id, "RUNNING"));
    nothing_left(&before, CLEAN_UP)
}
