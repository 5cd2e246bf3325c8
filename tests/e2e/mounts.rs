//! Mounts: what the client asks for, and what every container has.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::containerd::{Run, Runtime};
use serde_json::{Value, json};

use crate::Case;

pub const CASES: &[Case] = &[
    ("mounts::read_only_root", read_only_root),
    ("mounts::folder", folder),
    ("mounts::folder_read_only", folder_read_only),
    ("mounts::file", file),
    ("mounts::file_read_only", file_read_only),
    ("mounts::nested", nested),
    ("mounts::host_changes_are_seen", host_changes_are_seen),
    ("mounts::tmpfs", tmpfs),
    ("mounts::tmpfs_limits", tmpfs_limits),
    ("mounts::source_missing", source_missing),
    ("mounts::standard", standard),
    ("mounts::over_a_symbolic_link", over_a_symbolic_link),
];

fn bind(source: &std::path::Path, target: &str, options: &str) -> String {
    format!("type=bind,src={},dst={target},options={options}", source.display())
}

fn read_only_root(runtime: Runtime) -> Result<()> {
    let line = "touch /x 2>&1; mkdir /tmp/x 2>&1; echo still > /dev/shm/x && cat /dev/shm/x";
    let text = Run::shell(runtime, line).flag("--read-only").finish()?.text(0)?;
    let wanted = "touch: /x: Read-only file system\nmkdir: can't create directory '/tmp/x': \
                  Read-only file system\nstill";
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn folder(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("from-host"), "host\n")?;
    let line =
        "cat /data/from-host; echo guest > /data/new; rm /data/from-host; mkdir -p /data/a/b";
    let run =
        Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/data", "rbind:rw"));
    ensure!(run.finish()?.text(0)? == "host");
    ensure!(fs::read_to_string(here.path().join("new"))? == "guest\n");
    ensure!(!here.path().join("from-host").exists() && here.path().join("a/b").is_dir());
    Ok(())
}

fn folder_read_only(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("from-host"), "host\n")?;
    let line = "cat /data/from-host; touch /data/new 2>&1; rm -f /data/from-host 2>&1; \
                mount -o remount,rw /data 2>/dev/null || echo no remount";
    let run =
        Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/data", "rbind:ro"));
    let text = run.finish()?.text(0)?;
    let wanted = "host\ntouch: /data/new: Read-only file system\n\
                  rm: can't remove '/data/from-host': Read-only file system\nno remount";
    ensure!(text == wanted, "{text}");
    ensure!(here.path().join("from-host").exists());
    Ok(())
}

fn file(runtime: Runtime) -> Result<()> {
    let here = tempfile::NamedTempFile::new()?;
    fs::write(here.path(), "127.0.0.9 host\n")?;
    let line = "cat /etc/given; echo more >> /etc/given; stat -c %F /etc/given";
    let run =
        Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/etc/given", "rbind"));
    ensure!(run.finish()?.text(0)? == "127.0.0.9 host\nregular file");
    ensure!(fs::read_to_string(here.path())? == "127.0.0.9 host\nmore\n");
    Ok(())
}

fn file_read_only(runtime: Runtime) -> Result<()> {
    let here = tempfile::NamedTempFile::new()?;
    fs::write(here.path(), "secret\n")?;
    let line = "cat /secret; echo x > /secret || echo refused";
    let run =
        Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/secret", "bind:ro"));
    ensure!(run.finish()?.text(0)? == "secret\nrefused");
    ensure!(fs::read_to_string(here.path())? == "secret\n");
    Ok(())
}

fn nested(runtime: Runtime) -> Result<()> {
    let (outer, inner) = (tempfile::tempdir()?, tempfile::tempdir()?);
    fs::create_dir(outer.path().join("inner"))?;
    fs::write(inner.path().join("file"), "inner\n")?;
    let run =
        Run::shell(runtime, "cat /data/inner/file; echo x > /data/y; touch /data/inner/z 2>&1")
            .flag("--mount")
            .flag(bind(outer.path(), "/data", "rbind:rw"))
            .flag("--mount")
            .flag(bind(inner.path(), "/data/inner", "rbind:ro"));
    let text = run.finish()?.text(1)?;
    ensure!(text == "inner\ntouch: /data/inner/z: Read-only file system", "{text}");
    ensure!(
        outer.path().join("y").exists() && fs::read_dir(outer.path().join("inner"))?.count() == 0
    );
    Ok(())
}

fn host_changes_are_seen(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("value"), "old\n")?;
    let line = "cat /data/value; touch /data/ready; \
                for i in $(seq 100); do [ -e /data/go ] && break; sleep 0.2; done; sleep 1; cat /data/value";
    let run =
        Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/data", "rbind:rw"));
    let child = run.spawn_running()?;
    let since = std::time::Instant::now();
    while !here.path().join("ready").exists() {
        ensure!(since.elapsed().as_secs() < 30, "never ready");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // As a kubelet replaces a ConfigMap: a new file under the old name, which Husk's guest believes
    // for a second.
    fs::write(here.path().join("next"), "new and longer\n")?;
    fs::rename(here.path().join("next"), here.path().join("value"))?;
    fs::write(here.path().join("go"), "")?;
    let text = husk_tests::containerd::finish(child)?.text(0)?;
    ensure!(text == "old\nnew and longer", "{text}");
    Ok(())
}

fn add_mount(spec: &mut Value, mount: Value) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(mount);
    }
}

fn tmpfs(runtime: Runtime) -> Result<()> {
    let line = "grep ' /scratch ' /proc/mounts | cut -d' ' -f3; stat -c '%a' /scratch; \
                echo x > /scratch/x; /scratch/x 2>&1 | head -1; cp /bin/busybox /scratch/sh; \
                /scratch/sh true 2>&1 || true";
    let run = Run::spec(runtime, line, |spec| {
        let options = ["nosuid", "noexec", "nodev", "mode=1770", "size=4m"];
        let mount = json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                            "options": options });
        add_mount(spec, mount);
    })?;
    let text = run.finish()?.text(0)?;
    let wanted =
        "tmpfs\n1770\nsh: /scratch/x: Permission denied\nsh: /scratch/sh: Permission denied";
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn tmpfs_limits(runtime: Runtime) -> Result<()> {
    let line = "dd if=/dev/zero of=/scratch/x bs=1M count=8 2>&1 | grep -o 'No space left'; \
                stat -c %s /scratch/x";
    let run = Run::spec(runtime, line, |spec| {
        let mount = json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                            "options": ["size=4m"] });
        add_mount(spec, mount);
    })?;
    let text = run.finish()?.text(0)?;
    ensure!(text == "No space left\n4194304", "{text}");
    Ok(())
}

fn source_missing(runtime: Runtime) -> Result<()> {
    let missing = std::path::Path::new("/no/such/source");
    let run = Run::new(runtime, &["true"]).flag("--mount").flag(bind(missing, "/data", "rbind"));
    let finished = run.finish()?;
    finished.text(1)?;
    ensure!(finished.stderr.contains("/no/such/source"), "{}", finished.stderr);
    ensure!(finished.stderr.contains("no such file or directory"), "{}", finished.stderr);
    Ok(())
}

fn standard(runtime: Runtime) -> Result<()> {
    let line = "for m in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /sys/fs/cgroup /run; do \
                grep \" $m \" /proc/mounts | tail -1 | cut -d' ' -f2,3; done";
    let text = Run::shell(runtime, line).finish()?.text(0)?;
    let wanted = "/proc proc\n/dev tmpfs\n/dev/pts devpts\n/dev/shm tmpfs\n/dev/mqueue mqueue\n\
                  /sys sysfs\n/sys/fs/cgroup cgroup2\n/run tmpfs";
    // containerd's default spec has the cgroup mount only for some clients.
    ensure!(text == wanted || text == wanted.replace("/sys/fs/cgroup cgroup2\n", ""), "{text}");
    Ok(())
}

fn over_a_symbolic_link(runtime: Runtime) -> Result<()> {
    // The target's link is followed inside the container's root, never on the host.
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("file"), "bound\n")?;
    let run = Run::spec(runtime, "cat /real/file; ls /", |spec| {
        let root = spec["root"]["path"].as_str().unwrap_or_default().to_owned();
        let _ = fs::create_dir(format!("{root}/real"));
        let _ = std::os::unix::fs::symlink("/real", format!("{root}/link"));
        let mount = json!({ "destination": "/link", "type": "bind", "source": here.path(),
                            "options": ["rbind", "ro"] });
        add_mount(spec, mount);
    })?;
    let text = run.finish()?.text(0)?;
    ensure!(text.starts_with("bound\n"), "{text}");
    Ok(())
}
