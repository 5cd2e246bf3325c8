//! What clients ask of a running container: processes added, pausing, numbers, events.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime, ctr, spawn};
use husk_tests::events::Events;
use husk_tests::processes;
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until, until_true};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::Case;
use crate::within::SHARED;

pub const CASES: &[Case] = &[
    ("task::exec", exec),
    ("task::exec_is_as_restricted_as_init", exec_is_restricted),
    ("task::exec_errors", exec_errors),
    ("task::exec_outlived_by_init", exec_outlived),
    ("task::list", list),
    ("task::pid", pid),
    ("task::sigterm_to_the_pid", sigterm),
    ("task::pause", pause),
    ("task::kill_while_paused", kill_while_paused),
    ("task::metrics", metrics),
    ("task::limits", limits),
    ("task::out_of_memory", out_of_memory),
    ("task::events", events),
    ("task::attach_twice", attach_twice),
    ("task::delete_while_running", delete_while_running),
];

fn sleeping(runtime: Runtime) -> Result<Task> {
    Task::start(Run::new(runtime, &["sleep", "1000"]))
}

fn exec(runtime: Runtime) -> Result<()> {
    // A container of its own: for `--user`, `ctr` mounts the snapshot a second time, which takes the overlay's
    // work folder from the running container, on any runtime. After that it makes no files.
    let task = sleeping(runtime)?;
    let finished = task.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"])?;
    ensure!(finished.text(3)? == "out" && finished.stderr == "err\n", "{finished:?}");
    let text = task.exec_with(&["--cwd", "/tmp", "--user", "1000"], &["sh", "-c", "pwd; id -u"])?;
    ensure!(text.text(0)? == "/tmp\n1000", "{text:?}");
    ensure!(task.shell("hostname; echo $PATH")?.lines().count() == 2);
    // What is asked first may be answered last.
    let slow =
        spawn(&["task", "exec", "--exec-id", "slow", &task.id, "sh", "-c", "sleep 2; echo slow"])?;
    ensure!(task.shell("echo fast")? == "fast");
    ensure!(husk_tests::containerd::finish(slow)?.text(0)? == "slow");
    Ok(())
}

/// What a client can do with the pid that it was told, without containerd.
fn sigterm(runtime: Runtime) -> Result<()> {
    let line = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.2; done";
    let run = Run::shell(runtime, line);
    let mut child = run.spawn_running()?;
    drop(child.stdin.take());
    // Before its trap is set the first process of a PID namespace ignores the signal.
    let out = child.stdout.as_mut().context("no output")?;
    std::io::Read::read_exact(out, &mut [0; 6])?;
    processes::signal(husk_tests::client::task(&run.id)?.pid, Signal::SIGTERM)?;
    husk_tests::containerd::finish(child)?.text(143).map(drop)
}

fn exec_is_restricted(runtime: Runtime) -> Result<()> {
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]).flag("--seccomp"))?;
    let line = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/$0/status; cat /proc/$0/cgroup; \
                for n in pid mnt net ipc uts; do readlink /proc/$0/ns/$n; done";
    let (init, added) = (line.replace("$0", "1"), line.replace("$0", "self"));
    let (init, added) = (task.shell(&init)?, task.shell(&added)?);
    ensure!(init == added, "{added}\ninstead of\n{init}");
    ensure!(init.contains("Seccomp:\t2"), "{init}");
    Ok(())
}

fn exec_errors(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let since = Instant::now();
    let missing = task.exec(&["nosuch"])?;
    let wanted = r#"exec: "nosuch": executable file not found in $PATH"#;
    ensure!(missing.code == 1 && missing.stderr.contains(wanted), "{missing:?}");
    ensure!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    let words = ["task", "exec", "--exec-id", "same", &task.id, "sleep", "5"];
    let first = spawn(&words)?;
    std::thread::sleep(Duration::from_secs(3));
    let second = husk_tests::containerd::finish(spawn(&words)?)?;
    husk_tests::containerd::finish(first)?.text(0)?;
    ensure!(second.code == 1 && second.stderr.contains("already exists"), "{second:?}");
    // Its name is free again.
    husk_tests::containerd::finish(spawn(&words)?)?.text(0)?;
    Ok(())
}

fn exec_outlived(runtime: Runtime) -> Result<()> {
    let init = "until [ -e /tmp/there ]; do sleep 0.1; done; sleep 1";
    let task = Task::start(Run::shell(runtime, init))?;
    let long = "touch /tmp/there; exec sleep 1000";
    let exec = spawn(&["task", "exec", "--exec-id", "long", &task.id, "sh", "-c", long])?;
    // The container's end is the end of all its processes.
    husk_tests::containerd::finish(exec)?.text(137)?;
    task.becomes("STOPPED")
}

fn list(runtime: Runtime) -> Result<()> {
    let task = Task::start(Run::shell(runtime, "sleep 1000 & sleep 1000"))?;
    let exec = spawn(&["task", "exec", "--exec-id", "listed", &task.id, "sleep", "1000"])?;
    until_true("all three are listed", PATIENCE, || {
        let text = task.call("ps")?;
        // The first, its child, and the one added, which is named.
        let pids =
            text.lines().skip(1).filter(|line| line.starts_with(|c: char| c.is_ascii_digit()));
        Ok(pids.count() == 3 && text.contains("listed"))
    })?;
    ctr(&["task", "kill", "--signal", "SIGKILL", &task.id])?;
    husk_tests::containerd::finish(exec)?.text(137).map(drop)
}

/// The process that clients are told of stands for the container on the host; they find it among its
/// processes, and no stranger's.
fn pid(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let listed = ctr(&["task", "ls"])?;
    let line = listed.lines().find(|line| line.starts_with(&format!("{} ", task.id)));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).context("not listed")?;
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(cgroup.trim_end().ends_with(&format!("/default/{}", task.id)), "{cgroup}");
    let network = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net"));
    ensure!(network(pid)? != network("self")?, "it is in the host's network");
    let listed = task.call("ps")?;
    let pids = listed.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let pids: Vec<_> = pids.collect();
    ensure!(pids.contains(&pid), "{pid} is not among {pids:?}");
    for pid in pids {
        // One that has ended meanwhile is nobody's.
        let Ok(cgroup) = std::fs::read_to_string(format!("/proc/{pid}/cgroup")) else { continue };
        ensure!(cgroup.trim_end().ends_with(&format!("/default/{}", task.id)), "{pid}: {cgroup}");
    }
    Ok(())
}

fn pause(runtime: Runtime) -> Result<()> {
    let line = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done";
    let task = Task::start(Run::shell(runtime, line))?;
    // Between its opening and its writing the file is empty: that is no number yet.
    let count = || -> Result<Option<u64>> { Ok(task.shell("cat /tmp/count")?.parse().ok()) };
    task.call("pause")?;
    task.becomes("PAUSED")?;
    let again = task.call("pause").err().context("paused twice")?;
    ensure!(again.to_string().contains("paused"), "{again:#}");
    let refused = task.exec(&["true"])?;
    ensure!(refused.code == 1 && refused.stderr.contains("paused"), "{refused:?}");
    let before = task.metrics()?;
    std::thread::sleep(Duration::from_secs(2));
    let after = task.metrics()?;
    let used = |metrics: &serde_json::Value| metrics["cpu"]["usage_usec"].as_u64().unwrap_or(0);
    ensure!(used(&before) > 0 && used(&before) == used(&after), "{before} {after}");
    task.call("resume")?;
    task.becomes("RUNNING")?;
    let first = until("it counts", PATIENCE, count)?;
    until_true("it goes on", PATIENCE, || Ok(count()?.is_some_and(|now| now > first)))?;
    let again = task.call("resume").err().context("resumed twice")?;
    ensure!(again.to_string().contains("running"), "{again:#}");
    Ok(())
}

fn kill_while_paused(runtime: Runtime) -> Result<()> {
    let task = sleeping(runtime)?;
    task.call("pause")?;
    task.becomes("PAUSED")?;
    ctr(&["task", "kill", "--signal", "SIGKILL", &task.id])?;
    task.becomes("STOPPED")
}

fn metrics(runtime: Runtime) -> Result<()> {
    let run = Run::shell(runtime, "dd if=/dev/zero of=/dev/shm/f bs=1M count=8; sleep 1000");
    let task = Task::start(run.flag("--memory-limit").flag((100 << 20).to_string()))?;
    let mut seen = serde_json::Value::Null;
    let right = until_true("the numbers are right", PATIENCE, || {
        seen = task.metrics()?;
        let number = |group: &str, name: &str| seen[group][name].as_u64().unwrap_or(0);
        Ok(number("memory", "usage_limit") == 100 << 20
            && (8 << 20..64 << 20).contains(&number("memory", "usage"))
            && number("memory", "shmem") == 8 << 20
            && number("cpu", "usage_usec") > 0
            && number("cpu", "usage_usec") >= number("cpu", "user_usec")
            && (1..=2).contains(&number("pids", "current")))
    });
    right.with_context(|| seen.to_string())
}

fn limits(runtime: Runtime) -> Result<()> {
    let run = Run::spec(runtime, "cd /sys/fs/cgroup; cat memory.max cpu.max", |spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": "/sys/fs/cgroup", "type": "cgroup",
                                "source": "cgroup", "options": ["ro", "nosuid", "noexec"] }));
        }
        spec["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864 });
        spec["linux"]["resources"]["cpu"] = json!({ "quota": 30_000, "period": 100_000 });
    })?;
    let text = run.finish()?.text(0)?;
    ensure!(text == "67108864\n30000 100000", "{text:?}");
    Ok(())
}

fn out_of_memory(runtime: Runtime) -> Result<()> {
    let mut events = Events::follow()?;
    // Twice a process of the container is killed, and its init goes on.
    let line =
        "for n in 1 2; do tail -c 100m /dev/zero > /dev/null; echo $?; sleep 1; done; sleep 2";
    let run = Run::shell(runtime, line).flag("--memory-limit=33554432");
    let text = run.finish()?.text(0)?;
    ensure!(text == "137\n137", "{text:?}");
    let seen = events.until(&run.id, "/tasks/delete")?;
    let strikes = seen.iter().filter(|topic| *topic == "/tasks/oom").count();
    ensure!(strikes == 2, "{seen:?}");
    Ok(())
}

fn events(runtime: Runtime) -> Result<()> {
    let mut events = Events::follow()?;
    let task = sleeping(runtime)?;
    task.shell("true")?;
    task.call("pause")?;
    task.call("resume")?;
    ctr(&["task", "kill", "--signal", "SIGKILL", &task.id])?;
    task.becomes("STOPPED")?;
    task.call("delete").ok();
    let seen = events.until(&task.id, "/tasks/delete")?;
    let wanted = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(seen == wanted, "{seen:?}");
    Ok(())
}

fn attach_twice(runtime: Runtime) -> Result<()> {
    let line = "while read word; do echo \"<$word>\"; done; echo over";
    let task = Task::start(Run::shell(runtime, line))?;
    for word in ["first", "second"] {
        let mut child = spawn(&["task", "attach", &task.id])?;
        let mut input = child.stdin.take().context("no stdin")?;
        std::io::Write::write_all(&mut input, format!("{word}\n").as_bytes())?;
        let mut shown = String::new();
        BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut shown)?;
        child.kill()?;
        child.wait()?;
        ensure!(shown == format!("<{word}>\n"), "{shown:?}");
    }
    ensure!(task.shell("echo alive")? == "alive");
    Ok(())
}

fn delete_while_running(runtime: Runtime) -> Result<()> {
    let shared = SHARED.of(runtime)?;
    let task = &shared.task;
    let error = task.call("delete").err().context("deleted")?.to_string();
    ensure!(error.contains("must be stopped before deletion"), "{error}");
    ensure!(task.shell("echo alive")? == "alive");
    Ok(())
}
