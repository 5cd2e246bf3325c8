//! Hooks of the OCI spec: on the host, and in the container.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use husk_stage::Stage;
use husk_tests::containerd::{Run, Runtime};
use serde_json::{Value, json};

use crate::Case;

pub const CASES: &[Case] = &[
    ("hooks::each_at_its_moment", each_at_its_moment),
    ("hooks::mounts_reach_the_host", mounts_reach_the_host),
    ("hooks::failure_ends_the_creation", failure_ends_the_creation),
    ("hooks::failure_ends_the_started", failure_ends_the_started),
];

fn shell(line: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", line], "env": ["PATH=/bin:/usr/bin"] }])
}

fn each_at_its_moment(runtime: Runtime) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().display();
    // The container says what the hook in it has left there.
    let run = Run::spec(runtime, "cat /started-inside", |spec| {
        spec["annotations"] = json!({ "a": "b" });
        spec["hooks"] = json!({
            "prestart": shell(&format!("cat > {path}/prestart")),
            "createRuntime": shell(&format!("cat > {path}/create; ls {path} > {path}/order")),
            "startContainer": shell("echo inside > /started-inside"),
            "poststart": shell(&format!("cat > {path}/poststart")),
            "poststop": shell(&format!("cat > {path}/poststop")),
        });
        spec["root"]["readonly"] = false.into();
    })?;
    ensure!(run.finish()?.text(0)? == "inside");
    let told = |name: &str| -> Result<Value> {
        let text = std::fs::read(folder.path().join(name)).with_context(|| name.to_owned())?;
        Ok(serde_json::from_slice(&text)?)
    };
    let wanted = [
        ("prestart", "creating"),
        ("create", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    for (name, status) in wanted {
        let state = told(name)?;
        ensure!(state["id"] == run.id && state["annotations"]["a"] == "b", "{name}: {state}");
        // runc of Debian 12 says "created" of a process that runs.
        let right =
            state["status"] == status || name == "poststart" && state["status"] == "created";
        ensure!(right, "{name}: {state}");
        let bundle = state["bundle"].as_str().context("no bundle")?;
        ensure!(bundle.ends_with(&format!("/default/{}", run.id)), "{name}: {state}");
        let pid = state["pid"].as_u64().unwrap_or(0);
        ensure!((pid == 0) == (status == "stopped"), "{name}: {state}");
    }
    let order = std::fs::read_to_string(folder.path().join("order"))?;
    ensure!(order == "create\norder\nprestart\n", "{order}");
    Ok(())
}

/// As nerdctl's and CNI's: what a hook mounts stays on the host, and the process that it is told of
/// has the container's network.
fn mounts_reach_the_host(runtime: Runtime) -> Result<()> {
    let folder = Stage::new()?;
    let path = folder.path().display();
    let line = format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > {path}/net; \
         mkdir {path}/made && mount -t tmpfs made {path}/made && touch {path}/made/here"
    );
    let run = Run::spec(runtime, "true", |spec| {
        spec["hooks"] = json!({ "createRuntime": shell(&line) });
    })?;
    run.finish()?.text(0)?;
    let made = Path::new(&folder.path().join("made/here")).exists();
    nix::mount::umount(&folder.path().join("made"))?;
    ensure!(made, "the mount is not the host's");
    let network = std::fs::read_to_string(folder.path().join("net"))?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    ensure!(network.starts_with("net:") && Path::new(network.trim()) != own, "{network}");
    Ok(())
}

fn failure_ends_the_creation(runtime: Runtime) -> Result<()> {
    let run = Run::spec(runtime, "echo ran", |spec| {
        spec["hooks"] = json!({ "createRuntime": shell("echo because >&2; exit 7") });
    })?;
    let finished = run.finish()?;
    ensure!(finished.code == 1 && finished.stdout.is_empty(), "{finished:?}");
    ensure!(finished.stderr.contains("exit status"), "{finished:?}");
    Ok(())
}

/// A container whose hook says no after the start does not stay.
fn failure_ends_the_started(runtime: Runtime) -> Result<()> {
    let run = Run::spec(runtime, "sleep 1000", |spec| {
        spec["hooks"] = json!({ "poststart": shell("echo because >&2; exit 7") });
    })?;
    let finished = run.finish()?;
    ensure!(finished.code == 1, "{finished:?}");
    Ok(())
}
