//! Standard input, output and error: nothing lost, nothing mixed, nothing out of order.

use std::io::Read;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{PROBE, Run, Runtime, finish, probe_path, spawn};
use husk_tests::processes::{all, words};
use serde_json::Value;

use crate::Case;
use crate::endurance::number;
use crate::files::DEFAULT;
use crate::shared::Part;
use crate::within;

pub const CASES: &[Case] = &[
    ("stdio::apart", apart),
    ("stdio::through_cat", through_cat),
    ("stdio::slow_reader", slow_reader),
    ("stdio::ends_at_once_after_writing", ends_at_once),
    ("stdio::end_of_input", end_of_input),
    ("stdio::input_not_read", input_not_read),
    ("stdio::reopen_by_path", reopen_by_path),
    ("stdio::kinds", kinds),
    ("stdio::into_nothing", into_nothing),
    ("stdio::into_a_file", into_a_file),
    ("stdio::into_a_program", into_a_program),
    ("stdio::into_a_program_that_ended", into_a_program_that_ended),
    ("stdio::closed_by_the_process", closed_by_the_process),
];

/// MiB that go through a container's streams: many times what all buffers on the way hold.
const OUTPUT: u64 = 10;

const APART: Part = Part::new("apart", "echo out; echo err >&2; echo out again");
/// As nginx and others do with their logs; works on a pipe, not on a socket.
const REOPEN: Part = Part::new("reopen", "echo o > /dev/stdout; echo e > /dev/stderr");
const KINDS: Part =
    Part::new("kinds", "for n in 0 1 2; do readlink /proc/1/fd/$n | cut -d: -f1; done");

/// Parts that run in an ordinary container.
pub const PARTS: [Part; 3] = [APART, REOPEN, KINDS];

fn apart(runtime: Runtime) -> Result<()> {
    let shared = DEFAULT.of(runtime)?;
    let finished = APART.finished(&shared.ran)?;
    ensure!(finished.text(0)? == "out\nout again", "{finished:?}");
    ensure!(finished.stderr == "err\n", "{finished:?}");
    Ok(())
}

fn through_cat(runtime: Runtime) -> Result<()> {
    let mut state = 1_u32;
    let length = usize::try_from(number("HUSK_OUTPUT", OUTPUT)?)? << 20;
    let mut input = Vec::with_capacity(length);
    while input.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        input.extend_from_slice(&state.to_le_bytes());
    }
    let finished = Run::new(runtime, &["cat"]).finish_with(input.clone())?;
    ensure!(finished.code == 0, "{} {}", finished.code, finished.stderr);
    ensure!(finished.stdout.len() == input.len(), "{} bytes came back", finished.stdout.len());
    ensure!(finished.stdout == input, "other bytes came back");
    Ok(())
}

/// Reads numbered lines of 64 bytes to the end; fails at the first that is not the next.
fn check_pattern(out: &mut impl Read, mebibytes: u64, pause: Duration) -> Result<()> {
    let mut next = 0_u64;
    let mut block = vec![0; 64 << 10];
    for block_number in 0..mebibytes * 16 {
        out.read_exact(&mut block).with_context(|| format!("it ended before line {next}"))?;
        for line in block.chunks(64) {
            let number: u64 = std::str::from_utf8(&line[..63])?.parse()?;
            ensure!(number == next, "line {number} instead of {next}");
            next += 1;
        }
        if block_number % 256 == 0 {
            std::thread::sleep(pause);
        }
    }
    ensure!(out.read(&mut block)? == 0, "more than was written");
    Ok(())
}

fn pattern(runtime: Runtime, mebibytes: u64, before: Duration, pause: Duration) -> Result<()> {
    let child = Run::probe(runtime, &["pattern", &mebibytes.to_string()])?.spawn()?;
    check_child(child, mebibytes, before, pause)
}

/// Checks the output of a probe that has been started.
fn check_child(mut child: Child, mebibytes: u64, before: Duration, pause: Duration) -> Result<()> {
    drop(child.stdin.take());
    let mut out = child.stdout.take().context("no stdout")?;
    std::thread::sleep(before);
    let checked = check_pattern(&mut out, mebibytes, pause);
    drop(out);
    let mut errors = String::new();
    child.stderr.take().context("no stderr")?.read_to_string(&mut errors)?;
    let status = child.wait()?;
    checked.with_context(|| errors.clone())?;
    ensure!(status.success(), "{status}: {errors}");
    Ok(())
}

fn slow_reader(runtime: Runtime) -> Result<()> {
    let mebibytes = number("HUSK_OUTPUT", OUTPUT)?;
    pattern(runtime, mebibytes, Duration::from_secs(3), Duration::from_millis(50))
}

fn ends_at_once(runtime: Runtime) -> Result<()> {
    for _ in 0..2 {
        pattern(runtime, 1, Duration::ZERO, Duration::ZERO)?;
    }
    // As does a process that was added.
    let shared = within::SHARED.of(runtime)?;
    for number in 0..3 {
        let name = format!("ends-at-once-{number}");
        let child =
            spawn(&["task", "exec", "--exec-id", &name, &shared.task.id, PROBE, "pattern", "1"])?;
        check_child(child, 1, Duration::ZERO, Duration::ZERO)?;
    }
    Ok(())
}

fn end_of_input(runtime: Runtime) -> Result<()> {
    let run = Run::shell(runtime, "wc -c; echo done");
    let text = run.finish_with(b"twelve bytes".to_vec())?.text(0)?;
    ensure!(text == "12\ndone", "{text}");
    Ok(())
}

fn input_not_read(runtime: Runtime) -> Result<()> {
    // More than all buffers on the way hold.
    let finished = Run::shell(runtime, "sleep 3; echo done").finish_with(vec![b'x'; 8 << 20])?;
    ensure!(finished.text(0)? == "done", "{finished:?}");
    Ok(())
}

fn reopen_by_path(runtime: Runtime) -> Result<()> {
    let shared = DEFAULT.of(runtime)?;
    let finished = REOPEN.finished(&shared.ran)?;
    ensure!(finished.text(0)? == "o" && finished.stderr == "e\n", "{finished:?}");
    Ok(())
}

fn kinds(runtime: Runtime) -> Result<()> {
    let text = KINDS.text(&DEFAULT.of(runtime)?.ran, 0)?;
    // With runc the streams are containerd's FIFOs themselves.
    ensure!(
        text.lines().count() == 3
            && text.lines().all(|kind| kind == "pipe" || kind.starts_with("/run/containerd/fifo")),
        "{text}"
    );
    Ok(())
}

fn into_nothing(runtime: Runtime) -> Result<()> {
    // 3 if the input is more than nothing.
    let line = "head -c 1000000 /dev/zero; echo error >&2; [ $(wc -c) = 0 ] || exit 3; exit 4";
    let text = Run::shell(runtime, line).flag("--null-io").finish()?.text(4)?;
    ensure!(text.is_empty(), "{text}");
    Ok(())
}

fn into_a_file(runtime: Runtime) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("log");
    let line = "for n in 1 2 3; do echo out $n; done; sleep 1; echo error >&2; exit 5";
    let uri = format!("file://{}", path.display());
    Run::shell(runtime, line).flag("--log-uri").flag(uri).finish()?.text(5)?;
    let text = std::fs::read_to_string(path)?;
    ensure!(text == "out 1\nout 2\nout 3\nerror\n", "{text:?}");
    Ok(())
}

/// Asks for the probe as a logger into a file of its own.
struct Logged(tempfile::TempDir);

impl Logged {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self) -> String {
        self.0.path().join("log").display().to_string()
    }

    fn uri(&self) -> Result<String> {
        Ok(format!("binary://{}?log={}", probe_path()?, self.path()))
    }

    /// Returns who was logged, and the lines of each stream; the logger has ended by now.
    fn read(&self) -> Result<(String, String, String)> {
        let path = self.path();
        let left = all()?.into_iter().find(|pid| words(*pid).contains(&path));
        ensure!(left.is_none(), "the logger still runs");
        let (mut whose, mut out, mut errors) = (String::new(), String::new(), String::new());
        for line in std::fs::read_to_string(&path)?.lines() {
            let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            match text("stream").as_str() {
                "stdout" => out += &(text("log") + "\n"),
                "stderr" => errors += &(text("log") + "\n"),
                _ => whose = format!("{} of {}", text("id"), text("namespace")),
            }
        }
        Ok((whose, out, errors))
    }
}

fn into_a_program(runtime: Runtime) -> Result<()> {
    let logged = Logged::new()?;
    let line = "for n in $(seq 2000); do echo out $n; done; echo error >&2; exit 5";
    let run = Run::shell(runtime, line).flag("--log-uri").flag(logged.uri()?);
    run.finish()?.text(5)?;
    let (whose, out, errors) = logged.read()?;
    ensure!(whose == format!("{} of default", run.id), "{whose}");
    ensure!(out.lines().count() == 2000 && out.ends_with("out 2000\n"), "{out}");
    ensure!(errors == "error\n", "{errors}");
    // As does a process that was added; its name is the id then.
    let (logged, shared) = (Logged::new()?, within::SHARED.of(runtime)?);
    let uri = logged.uri()?;
    let line = "echo added; echo error >&2; exit 4";
    let flags = ["task", "exec", "--exec-id", "logged", "--log-uri", &uri, &shared.task.id];
    let mut child = spawn(&[&flags[..], &["sh", "-c", line]].concat())?;
    drop(child.stdin.take());
    finish(child)?.text(4)?;
    let told = logged.read()?;
    let expected = ("logged of default", "added\n", "error\n");
    ensure!((told.0.as_str(), told.1.as_str(), told.2.as_str()) == expected, "{told:?}");
    Ok(())
}

fn into_a_program_that_ended(runtime: Runtime) -> Result<()> {
    // The container goes on, and what it writes breaks.
    let line = "trap '' PIPE; sleep 1; echo lost || exit 9";
    Run::shell(runtime, line).flag("--log-uri").flag("binary:///bin/true").finish()?.text(9)?;
    let missing = Run::shell(runtime, "true").flag("--log-uri").flag("binary:///no/such");
    let refused = missing.finish()?;
    ensure!(refused.code != 0 && refused.stderr.contains("/no/such"), "{refused:?}");
    Ok(())
}

fn closed_by_the_process(runtime: Runtime) -> Result<()> {
    let line = "echo before; exec <&- >&- 2>&-; sleep 2; exit 6";
    let text = Run::shell(runtime, line).finish()?.text(6)?;
    ensure!(text == "before", "{text}");
    Ok(())
}
