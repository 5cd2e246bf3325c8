//! Cases that share one container for each runtime: what can be seen by a process added to it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{PROBE, Run, Runtime, ctr, finish, spawn};
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until_true};

use crate::Case;
use crate::shared::Shared;

pub const CASES: &[Case] = &[
    ("within::odd_names", |runtime| probe(runtime, "odd-names")),
    ("within::listing_set_back", |runtime| probe(runtime, "seek")),
    ("within::files_without_a_name", |runtime| probe_at(runtime, "temporary", "/volume")),
    ("within::extended_attributes", |runtime| probe(runtime, "extended")),
    ("within::times_and_modes", |runtime| probe(runtime, "times")),
    ("within::statistics", |runtime| probe(runtime, "statistics")),
    ("within::appended_by_many", |runtime| probe(runtime, "append")),
    ("within::copied_by_the_kernel", |runtime| probe(runtime, "copy")),
    ("within::inotify", |runtime| probe(runtime, "watch")),
    ("within::layers", layers),
    ("within::exec_many_at_once", many_at_once),
    ("within::exec_leaves_a_child", leaves_a_child),
    ("within::exec_long_arguments", long_arguments),
    ("within::exec_folder_is_missing", folder_is_missing),
    ("within::exec_session_and_input", session_and_input),
    ("within::exec_signals", signals),
];

/// A container that runs until the rows are done, and the volume it has.
pub struct Within {
    /// The container.
    pub task: Task,
    /// The folder that it sees as `/volume`.
    pub volume: tempfile::TempDir,
}

/// The runtime's container.
pub static SHARED: Shared<Within> = Shared::new(|runtime| {
    let volume = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.path().display());
    let run = Run::new(runtime, &["sleep", "100000"]).flag("--mount").flag(mount);
    Ok(Within { task: Task::start(run.with_probe()?)?, volume })
});

fn probe(runtime: Runtime, check: &str) -> Result<()> {
    probe_at(runtime, check, "/root")
}

fn probe_at(runtime: Runtime, check: &str, folder: &str) -> Result<()> {
    let text = SHARED.of(runtime)?.task.exec(&[PROBE, check, folder])?.text(0)?;
    ensure!(text == check, "{text}");
    Ok(())
}

/// What the image brought, changed: linked, moved, removed, made anew.
fn layers(runtime: Runtime) -> Result<()> {
    // The image's applets are links of one file; changed, one of them is a file of its own.
    let line = "ln /etc/passwd /root/hard && [ /root/hard -ef /etc/passwd ] && stat -c %h /etc/passwd; \
                mv /var/spool /var/moved && ls -R /var; \
                rm -r /home && mkdir /home && ls -A /home | wc -l; \
                chmod 700 /bin/yes && printf husk | dd of=/bin/yes conv=notrunc 2>/dev/null; sleep 1.2; \
                stat -c %a /bin/yes /bin/cat; head -c 4 /bin/yes; cmp -s /bin/cat /bin/ls && echo ' same'; \
                rm /bin/yes && [ ! -e /bin/yes ] && ls /bin | grep -c '^yes$'; \
                mkdir /bin/yes && stat -c %F /bin/yes; \
                mv /etc/passwd /etc/passwd- && mv /etc/passwd- /etc/passwd && wc -l < /etc/passwd";
    let shared = SHARED.of(runtime)?;
    let text = shared.task.shell(line)?;
    let wanted = "2\n/var:\nmoved\n\n/var/moved:\nmail\n\n/var/moved/mail:\n0\n700\n755\nhusk same\n0\ndirectory\n4";
    ensure!(text == wanted, "{text}");
    // On the host no other applet was copied up: what the container sees may be cached.
    let bin = shared.task.upper_folder()?.join("bin");
    let names: Vec<_> = bin.read_dir()?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    ensure!(names == ["yes"], "in the layer: {names:?}");
    Ok(())
}

fn many_at_once(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let started: Vec<_> = (0..12)
        .map(|number| {
            let (name, line) =
                (format!("at-once-{number}"), format!("echo {number}; exit {number}"));
            spawn(&["task", "exec", "--exec-id", &name, &task.id, "sh", "-c", &line])
        })
        .collect::<Result<_>>()?;
    for (number, child) in (0..).zip(started) {
        let text = finish(child)?.text(number)?;
        ensure!(text == number.to_string(), "{text} instead of {number}");
    }
    Ok(())
}

/// A child that holds the streams does not hold up the end; and it lives on.
fn leaves_a_child(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let since = Instant::now();
    let finished = task.exec(&["sh", "-c", "sleep 1234 & echo left; exit 4"])?;
    ensure!(finished.text(4)? == "left", "{finished:?}");
    ensure!(since.elapsed() < Duration::from_secs(30), "it took {:?}", since.elapsed());
    ensure!(task.shell("ps | grep -c '[s]leep 1234'")? == "1");
    Ok(())
}

fn long_arguments(runtime: Runtime) -> Result<()> {
    let long = "w".repeat(100_000);
    let mut words = vec!["sh", "-c", "echo $# ${#1} ${#10}", "sh"];
    words.extend([long.as_str(); 10]);
    let text = SHARED.of(runtime)?.task.exec(&words)?.text(0)?;
    ensure!(text == "10 100000 100000", "{text}");
    Ok(())
}

fn folder_is_missing(runtime: Runtime) -> Result<()> {
    let finished = SHARED.of(runtime)?.task.exec_with(&["--cwd", "/no/such"], &["true"])?;
    let wanted = "chdir to cwd (\"/no/such\") set in config.json failed: no such file or directory";
    ensure!(finished.code == 1 && finished.stderr.contains(wanted), "{finished:?}");
    Ok(())
}

/// It leads a session and a group of its own, and its input ends with the client's.
fn session_and_input(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let line = "echo ready; wc -c; exec awk '{ print ($1 == $5) ($1 == $6) }' /proc/self/stat";
    let words = ["task", "exec", "--exec-id", "session", &task.id, "sh", "-c", line];
    let mut child = spawn(&words)?;
    // `ctr` forgets to close the input if its own ends before the process runs.
    if let Some(out) = &mut child.stdout {
        std::io::Read::read_exact(out, &mut [0; 6])?;
    }
    drop(child.stdin.take());
    let text = finish(child)?.text(0)?;
    ensure!(text == "0\n11", "{text}");
    Ok(())
}

/// Ends by signals, its own and a client's.
fn signals(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let text =
        task.shell("for s in SEGV ABRT USR1; do sh -c \"kill -$s \\$\\$\"; echo $?; done")?;
    ensure!(text == "139\n134\n138", "{text}");
    let child = spawn(&["task", "exec", "--exec-id", "told", &task.id, "sleep", "4321"])?;
    until_true("the exec runs", PATIENCE, || {
        Ok(task.shell("ps | grep -c '[s]leep 4321' || true")? == "1")
    })?;
    let kill = ["task", "kill", "--exec-id", "told", "--signal", "SIGTERM", &task.id];
    ctr(&kill)?;
    finish(child)?.text(143)?;
    let again = ctr(&kill).err().context("killed twice")?;
    ensure!(again.to_string().contains("not found"), "{again:#}");
    Ok(())
}
