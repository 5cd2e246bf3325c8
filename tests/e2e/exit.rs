//! How a container ends, and what the person at the terminal sees of it.

use anyhow::{Result, ensure};
use husk_tests::client::task_is;
use husk_tests::containerd::{Run, Runtime, finish};
use husk_tests::wait::{PATIENCE, until_true};

use crate::Case;

pub const CASES: &[Case] = &[
    ("exit::zero", zero),
    ("exit::seven", seven),
    ("exit::no_such_command_in_a_shell", no_such_command_in_a_shell),
    ("exit::no_such_command", no_such_command),
    ("exit::not_executable", not_executable),
    ("exit::killed", killed),
    ("exit::terminated", terminated),
    ("exit::kill_after_the_end_is_not_found", kill_after_the_end),
    ("exit::duplicate_id", duplicate_id),
    ("exit::segmentation_fault", segmentation_fault),
    ("exit::signal_to_its_group", signal_to_its_group),
    ("exit::signal_to_all", signal_to_all),
];

fn zero(runtime: Runtime) -> Result<()> {
    Run::new(runtime, &["true"]).finish()?.text(0).map(drop)
}

fn seven(runtime: Runtime) -> Result<()> {
    Run::shell(runtime, "exit 7").finish()?.text(7).map(drop)
}

fn no_such_command_in_a_shell(runtime: Runtime) -> Result<()> {
    Run::shell(runtime, "nosuch").finish()?.text(127).map(drop)
}

fn no_such_command(runtime: Runtime) -> Result<()> {
    let finished = Run::new(runtime, &["nosuch"]).finish()?;
    finished.text(1)?;
    let wanted = r#"exec: "nosuch": executable file not found in $PATH"#;
    ensure!(finished.stderr.contains(wanted), "{}", finished.stderr);
    Ok(())
}

fn not_executable(runtime: Runtime) -> Result<()> {
    let finished = Run::new(runtime, &["/etc/passwd"]).finish()?;
    finished.text(1)?;
    let wanted = r#"exec: "/etc/passwd": permission denied"#;
    ensure!(finished.stderr.contains(wanted), "{}", finished.stderr);
    Ok(())
}

fn killed(runtime: Runtime) -> Result<()> {
    let run = Run::new(runtime, &["sleep", "1000"]);
    let child = run.spawn_running()?;
    run.kill("SIGKILL")?;
    finish(child)?.text(137).map(drop)
}

fn terminated(runtime: Runtime) -> Result<()> {
    // As PID 1 of its namespace the shell is only reached by signals it has a handler for; its
    // child dies of the signal itself.
    let line = "sleep 1000 & trap \"kill $!\" TERM; echo ready; wait $!; wait $!; exit $?";
    let run = Run::shell(runtime, line);
    let mut child = run.spawn_running()?;
    let mut ready = [0; 6];
    if let Some(out) = &mut child.stdout {
        std::io::Read::read_exact(out, &mut ready)?;
    }
    run.kill("SIGTERM")?;
    finish(child)?.text(143).map(drop)
}

fn kill_after_the_end(runtime: Runtime) -> Result<()> {
    let run = Run::new(runtime, &["true"]).keep().flag("--detach");
    run.finish()?.text(0)?;
    until_true("it is stopped", PATIENCE, || Ok(task_is(&run.id, "STOPPED")))?;
    let error = run.kill("SIGTERM").err().map(|e| e.to_string()).unwrap_or_default();
    husk_tests::containerd::ctr(&["task", "delete", &run.id])?;
    run.remove()?;
    ensure!(error.contains("process already finished: not found"), "{error:?}");
    Ok(())
}

fn duplicate_id(runtime: Runtime) -> Result<()> {
    let run = Run::new(runtime, &["sleep", "1000"]);
    let child = run.spawn_running()?;
    let second = run.finish()?;
    run.kill("SIGKILL")?;
    finish(child)?.text(137)?;
    ensure!(second.code == 1 && second.stderr.contains("already exists"), "{second:?}");
    Ok(())
}

/// Signals that it sends itself do not end the first process of a namespace; a fault does.
fn segmentation_fault(runtime: Runtime) -> Result<()> {
    Run::probe(runtime, &["crash"])?.finish()?.text(139).map(drop)
}

fn signal_to_its_group(runtime: Runtime) -> Result<()> {
    let line = "trap 'echo caught; exit 3' TERM; sleep 1000 & kill -TERM 0; wait";
    ensure!(Run::shell(runtime, line).finish()?.text(3)? == "caught");
    Ok(())
}

fn signal_to_all(runtime: Runtime) -> Result<()> {
    let line = "trap 'echo caught' USR1; sleep 1000 & echo ready; wait; wait $!; exit $?";
    let run = Run::shell(runtime, line);
    let mut child = run.spawn_running()?;
    if let Some(out) = &mut child.stdout {
        std::io::Read::read_exact(out, &mut [0; 6])?;
    }
    husk_tests::containerd::ctr(&["task", "kill", "--all", "--signal", "SIGUSR1", &run.id])?;
    // The child had no trap.
    ensure!(finish(child)?.text(138)? == "caught");
    Ok(())
}
