//! Terminals: sizes, keys that mean signals, job control, coming back.

use anyhow::{Result, ensure};
use husk_tests::containerd::{BUSYBOX, Runtime};
use husk_tests::task::Task;
use husk_tests::terminal::Terminal;

use crate::Case;
use crate::within::SHARED;

pub const CASES: &[Case] = &[
    ("terminal::size_and_resize", size_and_resize),
    ("terminal::interrupt", interrupt),
    ("terminal::job_control", job_control),
    ("terminal::exit_code", exit_code),
    ("terminal::exec", exec),
    ("terminal::attach_twice", attach_twice),
    ("terminal::hang_up", hang_up),
    ("terminal::every_key", every_key),
    ("terminal::long_paste", long_paste),
];

fn run(runtime: Runtime, id: &str, line: &str) -> Result<Terminal> {
    let id = format!("{}-{id}", runtime.name());
    let words =
        ["run", "--rm", "--tty", "--runtime", runtime.shim(), BUSYBOX, &id, "sh", "-c", line];
    Terminal::start(&words, 33, 77)
}

fn size_and_resize(runtime: Runtime) -> Result<()> {
    // `ctr` sets the size after the start; each number is typed by the shell only when it is there.
    let line = "until [ \"$(stty size)\" = '33 77' ]; do sleep 0.1; done; echo first; \
                until [ \"$(stty size)\" = '44 88' ]; do sleep 0.1; done; echo second";
    let mut terminal = run(runtime, "size", line)?;
    terminal.shows("first\n")?;
    terminal.resize(44, 88)?;
    terminal.shows("second\n")?;
    ensure!(terminal.ends()? == 0);
    Ok(())
}

fn interrupt(runtime: Runtime) -> Result<()> {
    let line = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = run(runtime, "interrupt", line)?;
    terminal.shows("ready\n")?;
    terminal.types("\x03")?;
    terminal.shows("caught\n")?;
    ensure!(terminal.ends()? == 5);
    Ok(())
}

fn job_control(runtime: Runtime) -> Result<()> {
    let mut terminal = run(runtime, "jobs", "PS1='in> ' exec sh -i")?;
    terminal.shows("in> ")?;
    terminal.types("sleep 1000\n")?;
    terminal.shows("sleep 1000\n")?;
    // The key is for the command only once the shell has put it before the terminal.
    std::thread::sleep(std::time::Duration::from_secs(2));
    terminal.types("\x1a")?;
    terminal.shows("Stopped")?;
    terminal.shows("in> ")?;
    terminal.types("kill %1; fg; exit 9\n")?;
    ensure!(terminal.ends()? == 9);
    Ok(())
}

fn exit_code(runtime: Runtime) -> Result<()> {
    let mut terminal =
        run(runtime, "code", "test -t 0 && test -t 1 && test -t 2 && echo yes; exit 7")?;
    terminal.shows("yes\n")?;
    ensure!(terminal.ends()? == 7);
    Ok(())
}

fn exec(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let line = "until [ \"$(stty size)\" = '20 60' ]; do sleep 0.1; done; tty; read a; echo got $a; exit 3";
    let words = ["task", "exec", "--tty", "--exec-id", "t", &task.id, "sh", "-c", line];
    let mut terminal = Terminal::start(&words, 20, 60)?;
    terminal.shows("/dev/pts/")?;
    terminal.types("word\n")?;
    terminal.shows("got word\n")?;
    ensure!(terminal.ends()? == 3);
    Ok(())
}

fn attach_twice(runtime: Runtime) -> Result<()> {
    let line = "while read word; do echo \"<$word>\"; done; echo over";
    let id = format!("{}-attached", runtime.name());
    let words =
        ["run", "--tty", "--detach", "--runtime", runtime.shim(), BUSYBOX, &id, "sh", "-c", line];
    ensure!(Terminal::start(&words, 24, 80)?.ends()? == 0);
    let task = Task::running(&id);
    for word in ["first", "second"] {
        let mut terminal = Terminal::start(&["task", "attach", &task.id], 24, 80)?;
        terminal.types(&format!("{word}\n"))?;
        terminal.shows(&format!("<{word}>\n"))?;
        // Killed where it is, as when a person's connection breaks.
    }
    ensure!(task.shell("echo alive")? == "alive");
    Ok(())
}

/// The end of the only process closes the terminal; what it started in the background ends with it.
fn hang_up(runtime: Runtime) -> Result<()> {
    let mut terminal = run(runtime, "hangup", "sleep 1000 & echo bye")?;
    terminal.shows("bye\n")?;
    ensure!(terminal.ends()? == 0);
    Ok(())
}

/// In raw mode each byte comes as it was typed, also those that mean signals or ends.
fn every_key(runtime: Runtime) -> Result<()> {
    let line = "stty raw -echo; echo ready; head -c 128 | od -An -v -tx1 | tr -d ' \\n'; echo .";
    let mut terminal = run(runtime, "keys", line)?;
    terminal.shows("ready\n")?;
    let keys: String = (0..128_u8).map(char::from).collect();
    terminal.types(&keys)?;
    let wanted: String = (0..128).map(|key| format!("{key:02x}")).collect();
    terminal.shows(&format!("{wanted}.\n"))?;
    ensure!(terminal.ends()? == 0);
    Ok(())
}

/// More than a terminal holds, typed at once.
fn long_paste(runtime: Runtime) -> Result<()> {
    let mut terminal = run(runtime, "paste", "stty -echo; echo ready; wc -lc | tr -s ' '; exit 4")?;
    terminal.shows("ready\n")?;
    let text = format!("{}\n", "a line of some length, to be counted".repeat(2)).repeat(500);
    terminal.types(&text)?;
    terminal.types("\x04")?;
    terminal.shows(&format!(" 500 {}\n", text.len()))?;
    ensure!(terminal.ends()? == 4);
    Ok(())
}
