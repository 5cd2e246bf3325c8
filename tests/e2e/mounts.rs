//! Mounts: what the client asks for, and what every container has.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Child;

use anyhow::{Context, Result, ensure};
use husk_stage::Stage;
use husk_tests::containerd::{PROBE, Run, Runtime, finish, spawn};
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until_true};
use serde_json::{Value, json};

use crate::Case;
use crate::files::DEFAULT;
use crate::shared::{Part, Ran, Shared, ran, script};
use crate::within;

pub const CASES: &[Case] = &[
    ("mounts::read_only_root", read_only_root),
    ("mounts::folder", folder),
    ("mounts::folder_read_only", folder_read_only),
    ("mounts::file", file),
    ("mounts::file_read_only", file_read_only),
    ("mounts::nested", nested),
    ("mounts::tmpfs", tmpfs),
    ("mounts::tmpfs_limits", tmpfs_limits),
    ("mounts::source_missing", source_missing),
    ("mounts::standard", standard),
    ("mounts::over_a_symbolic_link", over_a_symbolic_link),
    ("mounts::link_that_leads_out", link_that_leads_out),
    ("mounts::odd_names", odd_names),
    ("mounts::recursive_or_not", recursive_or_not),
    ("mounts::read_only_with_what_is_beneath_or_without", read_only_or_beneath_too),
    ("mounts::flags", flags),
    ("mounts::on_shared_memory", shared_memory),
    ("mounts::null_over_a_file", null_over_a_file),
    ("mounts::one_source_twice", one_source_twice),
    ("mounts::one_file_in_several_volumes", one_file_in_several_volumes),
    ("mounts::on_a_tmpfs", on_a_tmpfs),
];

pub fn bind(source: &std::path::Path, target: &str, options: &str) -> String {
    format!("type=bind,src={},dst={target},options={options}", source.display())
}

/// Parts of [`BOUND`], each with its folder of the host's.
const FOLDER: Part = Part::new(
    "folder",
    "cat /data/from-host; echo guest > /data/new; rm /data/from-host; mkdir -p /data/a/b",
);
const FOLDER_READ_ONLY: Part = Part::new(
    "folder_read_only",
    "cat /kept/from-host; touch /kept/new 2>&1; rm -f /kept/from-host 2>&1; \
     mount -o remount,rw /kept 2>/dev/null || echo no remount",
);
const FILE: Part =
    Part::new("file", "cat /etc/given; echo more >> /etc/given; stat -c %F /etc/given");
const FILE_READ_ONLY: Part =
    Part::new("file_read_only", "cat /secret; echo x > /secret || echo refused");
const NESTED: Part =
    Part::new("nested", "cat /outer/inner/file; echo x > /outer/y; touch /outer/inner/z 2>&1");
const RECURSIVE_OR_NOT: Part = Part::new(
    "recursive_or_not",
    "cat /all/inner/file; ls -A /one/inner | wc -l; touch /all/inner/x 2>&1",
);
const READ_ONLY_OR_BENEATH_TOO: Part = Part::new(
    "read_only_or_beneath_too",
    "touch /top/x 2>&1; touch /top/inner/top && echo written; touch /closed/x 2>&1; \
     cat /closed/inner/file; touch /closed/inner/closed 2>&1",
);
const FLAGS: Part = Part::new(
    "flags",
    "/flags/run 2>&1; mknod /flags/null c 1 3 && cat /flags/null 2>&1; \
     grep ' /flags ' /proc/mounts | cut -d' ' -f4 | tr , '\\n' | grep -E '^(rw|no(suid|dev|exec))$' | sort",
);
/// As secrets are hidden.
const NULL_OVER_A_FILE: Part = Part::new(
    "null_over_a_file",
    "stat -c '%F %t %T' /etc/passwd; wc -c < /etc/passwd; echo x > /etc/passwd && echo swallowed",
);
const ONE_SOURCE_TWICE: Part = Part::new(
    "one_source_twice",
    "echo text > /rw/file; cat /ro/file; touch /ro/file 2>&1; \
     ln /rw/file /rw/other && stat -c %h /ro/other; mv /rw/file /ro/moved 2>/dev/null || echo refused",
);

const ONE_FILE_IN_SEVERAL_VOLUMES: Part =
    Part::new("one_file_in_several_volumes", "/probe volumes /whole /part /again /one-file 2>&1");

/// A volume of memory at the place of shared memory, as large as its mount on the host says.
const SHARED_MEMORY: Part = Part::new(
    "shared_memory",
    "cat /dev/shm/there; echo more > /dev/shm/new; df -m /dev/shm | awk 'NR == 2 { print $2 }'",
);

/// A container with folders and files of the host's.
pub static BOUND: Shared<Bound> = Shared::new(|runtime| {
    let folder = Stage::new()?;
    let at = |name: &str| folder.path().join(name);
    for name in [
        "folder",
        "kept",
        "outer",
        "outer/inner",
        "inner",
        "all",
        "all/inner",
        "flags",
        "twice",
        "shm",
    ] {
        fs::create_dir(at(name))?;
    }
    fs::create_dir_all(at("whole/part"))?;
    fs::write(at("whole/part/file"), "")?;
    fs::write(at("folder/from-host"), "host\n")?;
    fs::write(at("kept/from-host"), "host\n")?;
    fs::write(at("given"), "127.0.0.9 host\n")?;
    fs::write(at("secret"), "secret\n")?;
    fs::write(at("inner/file"), "inner\n")?;
    let mounted = Mounted::tmpfs(at("all/inner"))?;
    fs::write(at("all/inner/file"), "inner\n")?;
    let memory = Mounted::tmpfs_of(at("shm"), "size=20m,mode=1777")?;
    fs::write(at("shm/there"), "there\n")?;
    fs::write(at("flags/run"), "#!/bin/sh\necho ran\n")?;
    fs::set_permissions(at("flags/run"), Permissions::from_mode(0o755))?;
    let mut run = Run::shell(
        runtime,
        &script(&[
            FOLDER,
            FOLDER_READ_ONLY,
            FILE,
            FILE_READ_ONLY,
            NESTED,
            RECURSIVE_OR_NOT,
            READ_ONLY_OR_BENEATH_TOO,
            FLAGS,
            NULL_OVER_A_FILE,
            ONE_SOURCE_TWICE,
            ONE_FILE_IN_SEVERAL_VOLUMES,
            SHARED_MEMORY,
        ]),
    )
    .with_probe()?;
    for (source, target, options) in [
        ("folder", "/data", "rbind:rw"),
        ("kept", "/kept", "rbind:ro"),
        ("given", "/etc/given", "rbind"),
        ("secret", "/secret", "bind:ro"),
        ("outer", "/outer", "rbind:rw"),
        ("inner", "/outer/inner", "rbind:ro"),
        ("all", "/all", "rbind:rw"),
        ("all", "/one", "bind:rw"),
        ("all", "/top", "rbind:ro"),
        ("all", "/closed", "rbind:rro"),
        ("flags", "/flags", "rbind:rw:nosuid:nodev:noexec"),
        ("twice", "/rw", "rbind:rw"),
        ("twice", "/ro", "rbind:ro"),
        ("whole", "/again", "rbind:ro"),
        ("whole", "/whole", "rbind:rw"),
        ("whole/part", "/part", "rbind:rw"),
        ("whole/part/file", "/one-file", "bind:rw"),
        ("shm", "/dev/shm", "rbind:rw"),
    ] {
        run = run.flag("--mount").flag(bind(&at(source), target, options));
    }
    let null = bind(std::path::Path::new("/dev/null"), "/etc/passwd", "bind");
    let ran = ran(&run.flag("--mount").flag(null))?;
    Ok(Bound { ran, mounted, memory, folder })
});

/// Results of [`BOUND`].
pub struct Bound {
    ran: Ran,
    // Before its folder goes.
    mounted: Mounted,
    memory: Mounted,
    folder: Stage,
}

impl Bound {
    fn says(&self, part: Part, code: i32, wanted: &str) -> Result<()> {
        says(&self.ran, part, code, wanted)
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

fn says(ran: &Ran, part: Part, code: i32, wanted: &str) -> Result<()> {
    let text = part.text(ran, code)?;
    ensure!(text == wanted, "{text:?} instead of {wanted:?}");
    Ok(())
}

/// A part of an ordinary container.
pub const STANDARD: Part = Part::new(
    "standard",
    "for m in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /sys/fs/cgroup /run; do \
     grep \" $m \" /proc/mounts | tail -1 | cut -d' ' -f2,3; done",
);

/// Parts of [`SPECIFIED`].
const TMPFS: Part = Part::new(
    "tmpfs",
    "grep ' /scratch ' /proc/mounts | cut -d' ' -f3; stat -c '%a' /scratch; \
     echo x > /scratch/x; /scratch/x 2>&1 | head -1; cp /bin/busybox /scratch/sh; \
     /scratch/sh true 2>&1 || true",
);
const TMPFS_LIMITS: Part = Part::new(
    "tmpfs_limits",
    "dd if=/dev/zero of=/small/x bs=1M count=8 2>&1 | grep -o 'No space left'; stat -c %s /small/x",
);
const OVER_A_SYMBOLIC_LINK: Part = Part::new("over_a_symbolic_link", "cat /real/file; ls /");
const LINK_THAT_LEADS_OUT: Part = Part::new("link_that_leads_out", "cat $OUTSIDE/deep/file");
const ODD_NAMES: Part = Part::new("odd_names", "cat /odd/*/file");
/// Mounts are made in their order, each on what the ones before have made.
const ON_A_TMPFS: Part = Part::new(
    "on_a_tmpfs",
    "cat /layered/in/file /layered/one; ls /layered; touch /layered/x && echo written; \
     grep -c ' /layered' /proc/mounts; touch /layered/in/last/x 2>&1",
);
const NAMES: [&str; 4] = ["two  words", "line\nbreak", "snow☃man", "comma,=:\"quote'\\"];

/// A container with mounts that only a spec has. The second of its folders is one that a link names.
pub static SPECIFIED: Shared<Ran> = Shared::new(|runtime| {
    let (here, outside) = (tempfile::tempdir()?, tempfile::tempdir()?);
    fs::write(here.path().join("file"), "bound\n")?;
    for name in NAMES {
        fs::create_dir(here.path().join(name))?;
        fs::write(here.path().join(name).join("file"), format!("{name}.\n"))?;
    }
    let parts =
        [TMPFS, TMPFS_LIMITS, OVER_A_SYMBOLIC_LINK, LINK_THAT_LEADS_OUT, ODD_NAMES, ON_A_TMPFS];
    let run = Run::spec(runtime, &script(&parts), |spec| {
        let root = spec["root"]["path"].as_str().unwrap_or_default().to_owned();
        spec["root"]["readonly"] = false.into();
        spec["linux"]["rootfsPropagation"] = "rslave".into();
        if let Some(environment) = spec["process"]["env"].as_array_mut() {
            environment.push(format!("OUTSIDE={}", outside.path().display()).into());
        }
        let _ = fs::create_dir(format!("{root}/real"));
        let _ = std::os::unix::fs::symlink("/real", format!("{root}/link"));
        let link = format!("../../../../../..{}", outside.path().display());
        let _ = std::os::unix::fs::symlink(&link, format!("{root}/out"));
        // A link to nowhere is runc's alone to follow: docs/differences.md.
        let _ = fs::create_dir_all(format!("{root}{}", outside.path().display()));
        let file = here.path().join("file");
        let options = ["nosuid", "noexec", "nodev", "mode=1770", "size=4m"];
        for mount in [
            json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                    "options": options }),
            json!({ "destination": "/small", "type": "tmpfs", "source": "tmpfs",
                    "options": ["size=4m"] }),
            json!({ "destination": "/link", "type": "bind", "source": here.path(),
                    "options": ["rbind", "ro"] }),
            json!({ "destination": "/out/deep", "type": "bind", "source": here.path(),
                    "options": ["bind"] }),
            json!({ "destination": "/layered", "type": "tmpfs", "source": "tmpfs" }),
            json!({ "destination": "/layered/in", "type": "bind", "source": here.path(),
                    "options": ["rbind"] }),
            json!({ "destination": "/layered/one", "type": "bind", "source": file,
                    "options": ["bind"] }),
            json!({ "destination": "/layered/in/last", "type": "tmpfs", "source": "tmpfs",
                    "options": ["ro"] }),
        ] {
            add_mount(spec, mount);
        }
        for name in NAMES {
            let mount = json!({ "destination": format!("/odd/{name}"), "type": "bind",
                                "source": here.path().join(name), "options": ["rbind", "ro"] });
            add_mount(spec, mount);
        }
    })?;
    let mut ran = ran(&run)?;
    ran.folders = vec![here, outside];
    Ok(ran)
});

fn read_only_root(runtime: Runtime) -> Result<()> {
    let line = "touch /x 2>&1; mkdir /tmp/x 2>&1; echo still > /dev/shm/x && cat /dev/shm/x";
    let text = Run::shell(runtime, line).flag("--read-only").finish()?.text(0)?;
    let wanted = "touch: /x: Read-only file system\nmkdir: can't create directory '/tmp/x': \
                  Read-only file system\nstill";
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn folder(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(FOLDER, 0, "host")?;
    ensure!(fs::read_to_string(bound.at("folder/new"))? == "guest\n");
    ensure!(!bound.at("folder/from-host").exists() && bound.at("folder/a/b").is_dir());
    Ok(())
}

fn folder_read_only(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    let wanted = "host\ntouch: /kept/new: Read-only file system\n\
                  rm: can't remove '/kept/from-host': Read-only file system\nno remount";
    bound.says(FOLDER_READ_ONLY, 0, wanted)?;
    ensure!(bound.at("kept/from-host").exists());
    Ok(())
}

fn file(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(FILE, 0, "127.0.0.9 host\nregular file")?;
    ensure!(fs::read_to_string(bound.at("given"))? == "127.0.0.9 host\nmore\n");
    Ok(())
}

fn file_read_only(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(FILE_READ_ONLY, 0, "secret\nrefused")?;
    ensure!(fs::read_to_string(bound.at("secret"))? == "secret\n");
    Ok(())
}

fn nested(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(NESTED, 1, "inner\ntouch: /outer/inner/z: Read-only file system")?;
    ensure!(bound.at("outer/y").exists() && fs::read_dir(bound.at("outer/inner"))?.count() == 0);
    Ok(())
}

fn add_mount(spec: &mut Value, mount: Value) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(mount);
    }
}

fn tmpfs(runtime: Runtime) -> Result<()> {
    let wanted =
        "tmpfs\n1770\nsh: /scratch/x: Permission denied\nsh: /scratch/sh: Permission denied";
    says(&*SPECIFIED.of(runtime)?, TMPFS, 0, wanted)
}

fn tmpfs_limits(runtime: Runtime) -> Result<()> {
    says(&*SPECIFIED.of(runtime)?, TMPFS_LIMITS, 0, "No space left\n4194304")
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
    let text = STANDARD.text(&DEFAULT.of(runtime)?.ran, 0)?;
    let wanted = "/proc proc\n/dev tmpfs\n/dev/pts devpts\n/dev/shm tmpfs\n/dev/mqueue mqueue\n\
                  /sys sysfs\n/sys/fs/cgroup cgroup2\n/run tmpfs";
    // containerd's default spec has the cgroup mount only for some clients.
    ensure!(text == wanted || text == wanted.replace("/sys/fs/cgroup cgroup2\n", ""), "{text}");
    Ok(())
}

/// The target's link is followed inside the container's root, never on the host.
fn over_a_symbolic_link(runtime: Runtime) -> Result<()> {
    let text = OVER_A_SYMBOLIC_LINK.text(&*SPECIFIED.of(runtime)?, 0)?;
    ensure!(text.starts_with("bound\n"), "{text}");
    Ok(())
}

/// As many steps up as one likes: the container's root is above it.
fn link_that_leads_out(runtime: Runtime) -> Result<()> {
    let ran = SPECIFIED.of(runtime)?;
    says(&ran, LINK_THAT_LEADS_OUT, 0, "bound")?;
    ensure!(fs::read_dir(ran.folders[1].path())?.count() == 0, "it has reached the host");
    Ok(())
}

fn odd_names(runtime: Runtime) -> Result<()> {
    let mut sorted = NAMES;
    sorted.sort_unstable();
    let wanted = sorted.map(|name| format!("{name}.")).join("\n");
    says(&*SPECIFIED.of(runtime)?, ODD_NAMES, 0, &wanted)
}

fn read_only_or_beneath_too(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    let wanted = "touch: /top/x: Read-only file system\nwritten\n\
                  touch: /closed/x: Read-only file system\ninner\n\
                  touch: /closed/inner/closed: Read-only file system";
    bound.says(READ_ONLY_OR_BENEATH_TOO, 1, wanted)?;
    ensure!(bound.mounted.0.join("top").exists() && !bound.mounted.0.join("closed").exists());
    Ok(())
}

/// A mount of the host's that ends with this value.
pub struct Mounted(std::path::PathBuf);

impl Mounted {
    /// Mounts a file system in memory with `options`.
    pub fn tmpfs_of(path: std::path::PathBuf, options: &str) -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        mount(Some("shm"), &path, Some("tmpfs"), MsFlags::empty(), Some(options))?;
        Ok(Self(path))
    }

    /// Mounts the folder `source` again.
    pub fn bind(source: &std::path::Path, path: std::path::PathBuf) -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        mount(Some(source), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(Self(path))
    }

    /// Mounts a file system in memory whose mount hands on what is mounted beneath.
    pub fn tmpfs(path: std::path::PathBuf) -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        let none = None::<&str>;
        mount(Some("tests"), &path, Some("tmpfs"), MsFlags::empty(), none)?;
        let mounted = Self(path);
        mount(none, &mounted.0, none, MsFlags::MS_SHARED, none)?;
        Ok(mounted)
    }

    /// Mounts a new ext4 in the file `image`.
    pub fn ext4(image: &std::path::Path, path: std::path::PathBuf) -> Result<Self> {
        use std::process::Command;
        fs::File::create(image)?.set_len(16 << 20)?;
        for command in [
            Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image),
            Command::new("mount").args(["-o", "loop"]).arg(image).arg(&path),
        ] {
            ensure!(command.status()?.success(), "{command:?}");
        }
        Ok(Self(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn recursive_or_not(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(RECURSIVE_OR_NOT, 0, "inner\n0")?;
    ensure!(bound.mounted.0.join("x").exists(), "what is written below is not on the host");
    Ok(())
}

fn shared_memory(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(SHARED_MEMORY, 0, "there\n20")?;
    ensure!(fs::read_to_string(bound.memory.0.join("new"))? == "more\n");
    Ok(())
}

fn flags(runtime: Runtime) -> Result<()> {
    let wanted = "sh: /flags/run: Permission denied\ncat: can't open '/flags/null': Permission denied\n\
                  nodev\nnoexec\nnosuid\nrw";
    BOUND.of(runtime)?.says(FLAGS, 0, wanted)
}

fn null_over_a_file(runtime: Runtime) -> Result<()> {
    let wanted = "character special file 1 3\n0\nswallowed";
    BOUND.of(runtime)?.says(NULL_OVER_A_FILE, 0, wanted)
}

fn one_source_twice(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    let wanted = "text\ntouch: /ro/file: Read-only file system\n2\nrefused";
    bound.says(ONE_SOURCE_TWICE, 0, wanted)?;
    ensure!(fs::read_to_string(bound.at("twice/other"))? == "text\n");
    Ok(())
}

/// A folder, its subfolder, the folder again, and a file of it.
fn one_file_in_several_volumes(runtime: Runtime) -> Result<()> {
    let bound = BOUND.of(runtime)?;
    bound.says(ONE_FILE_IN_SEVERAL_VOLUMES, 0, "volumes")?;
    ensure!(fs::metadata(bound.at("whole/part/file"))?.len() == 103);
    Ok(())
}

fn on_a_tmpfs(runtime: Runtime) -> Result<()> {
    let wanted = "bound\nbound\nin\none\nwritten\n4\n\
                  touch: /layered/in/last/x: Read-only file system";
    says(&*SPECIFIED.of(runtime)?, ON_A_TMPFS, 1, wanted)
}
