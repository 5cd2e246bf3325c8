//! Mounts: what the client asks for, and what every container has.

use std::fs;

use anyhow::{Result, ensure};
use husk_tests::containerd::{Run, Runtime};
use husk_tests::wait::{PATIENCE, until_true};
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
    ("mounts::link_that_leads_out", link_that_leads_out),
    ("mounts::odd_names", odd_names),
    ("mounts::recursive_or_not", recursive_or_not),
    ("mounts::flags", flags),
    ("mounts::null_over_a_file", null_over_a_file),
    ("mounts::one_source_twice", one_source_twice),
    ("mounts::on_a_tmpfs", on_a_tmpfs),
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
    until_true("it is ready", PATIENCE, || Ok(here.path().join("ready").exists()))?;
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

/// As many steps up as one likes: the container's root is above it.
fn link_that_leads_out(runtime: Runtime) -> Result<()> {
    let (here, outside) = (tempfile::tempdir()?, tempfile::tempdir()?);
    fs::write(here.path().join("file"), "bound\n")?;
    let link = format!("../../../../../..{}", outside.path().display());
    let line = format!("cat {}/deep/file", outside.path().display());
    let run = Run::spec(runtime, &line, |spec| {
        let root = spec["root"]["path"].as_str().unwrap_or_default().to_owned();
        let _ = std::os::unix::fs::symlink(&link, format!("{root}/out"));
        // A link to nowhere is runc's alone to follow: docs/differences.md.
        let _ = fs::create_dir_all(format!("{root}{}", outside.path().display()));
        let mount = json!({ "destination": "/out/deep", "type": "bind", "source": here.path(),
                            "options": ["bind"] });
        add_mount(spec, mount);
        spec["root"]["readonly"] = false.into();
    })?;
    let text = run.finish()?.text(0)?;
    ensure!(text == "bound", "{text}");
    ensure!(fs::read_dir(outside.path())?.count() == 0, "it has reached the host");
    Ok(())
}

fn odd_names(runtime: Runtime) -> Result<()> {
    let above = tempfile::tempdir()?;
    let names = ["two  words", "line\nbreak", "snow☃man", "comma,=:\"quote'\\"];
    for name in names {
        fs::create_dir(above.path().join(name))?;
        fs::write(above.path().join(name).join("file"), format!("{name}.\n"))?;
    }
    let run = Run::spec(runtime, "cat /*/file", |spec| {
        for name in names {
            let mount = json!({ "destination": format!("/{name}"), "type": "bind",
                                "source": above.path().join(name), "options": ["rbind", "ro"] });
            add_mount(spec, mount);
        }
    })?;
    let text = run.finish()?.text(0)?;
    let mut sorted = names;
    sorted.sort_unstable();
    ensure!(text == sorted.map(|name| format!("{name}.")).join("\n"), "{text}");
    Ok(())
}

/// A mount of the host's that ends with this value.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn recursive_or_not(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    let inner = here.path().join("inner");
    fs::create_dir(&inner)?;
    let (none, flags) = (None::<&str>, nix::mount::MsFlags::empty());
    nix::mount::mount(Some("inner"), &inner, Some("tmpfs"), flags, none)?;
    let inner = Mounted(inner);
    fs::write(inner.0.join("file"), "inner\n")?;
    let line = "cat /all/inner/file; ls -A /one/inner | wc -l; touch /all/inner/x 2>&1";
    let run = Run::shell(runtime, line)
        .flag("--mount")
        .flag(bind(here.path(), "/all", "rbind:rw"))
        .flag("--mount")
        .flag(bind(here.path(), "/one", "bind:rw"));
    let text = run.finish()?.text(0)?;
    ensure!(text == "inner\n0", "{text}");
    ensure!(inner.0.join("x").exists(), "what is written below is not on the host");
    Ok(())
}

fn flags(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("run"), "#!/bin/sh\necho ran\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(here.path().join("run"), mode)?;
    let line = "/data/run 2>&1; mknod /data/null c 1 3 && cat /data/null 2>&1; \
                grep ' /data ' /proc/mounts | cut -d' ' -f4 | tr , '\\n' | grep -E '^(rw|no(suid|dev|exec))$' | sort";
    let options = "rbind:rw:nosuid:nodev:noexec";
    let run = Run::shell(runtime, line).flag("--mount").flag(bind(here.path(), "/data", options));
    let text = run.finish()?.text(0)?;
    let wanted = "sh: /data/run: Permission denied\ncat: can't open '/data/null': Permission denied\n\
                  nodev\nnoexec\nnosuid\nrw";
    ensure!(text == wanted, "{text}");
    Ok(())
}

/// As secrets are hidden.
fn null_over_a_file(runtime: Runtime) -> Result<()> {
    let null = std::path::Path::new("/dev/null");
    let line = "stat -c '%F %t %T' /etc/passwd; wc -c < /etc/passwd; echo x > /etc/passwd && echo swallowed";
    let run = Run::shell(runtime, line).flag("--mount").flag(bind(null, "/etc/passwd", "bind"));
    let text = run.finish()?.text(0)?;
    ensure!(text == "character special file 1 3\n0\nswallowed", "{text}");
    Ok(())
}

fn one_source_twice(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    let line = "echo text > /rw/file; cat /ro/file; touch /ro/file 2>&1; \
                ln /rw/file /rw/other && stat -c %h /ro/other; mv /rw/file /ro/moved 2>/dev/null || echo refused";
    let run = Run::shell(runtime, line)
        .flag("--mount")
        .flag(bind(here.path(), "/rw", "rbind:rw"))
        .flag("--mount")
        .flag(bind(here.path(), "/ro", "rbind:ro"));
    let text = run.finish()?.text(0)?;
    ensure!(text == "text\ntouch: /ro/file: Read-only file system\n2\nrefused", "{text}");
    ensure!(fs::read_to_string(here.path().join("other"))? == "text\n");
    Ok(())
}

/// Mounts are made in their order, each on what the ones before have made.
fn on_a_tmpfs(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    fs::write(here.path().join("file"), "bound\n")?;
    let line = "cat /scratch/in/file /scratch/one; ls /scratch; touch /scratch/x && echo written; \
                grep -c ' /scratch' /proc/mounts; touch /scratch/in/last/x 2>&1";
    let run = Run::spec(runtime, line, |spec| {
        add_mount(spec, json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs" }));
        add_mount(
            spec,
            json!({ "destination": "/scratch/in", "type": "bind",
                                "source": here.path(), "options": ["rbind"] }),
        );
        add_mount(
            spec,
            json!({ "destination": "/scratch/one", "type": "bind",
                                "source": here.path().join("file"), "options": ["bind"] }),
        );
        add_mount(
            spec,
            json!({ "destination": "/scratch/in/last", "type": "tmpfs",
                                "source": "tmpfs", "options": ["ro"] }),
        );
    })?;
    let text = run.finish()?.text(1)?;
    let wanted = "bound\nbound\nin\none\nwritten\n4\n\
                  touch: /scratch/in/last/x: Read-only file system";
    ensure!(text == wanted, "{text}");
    Ok(())
}
