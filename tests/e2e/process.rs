//! What a process is given: arguments, environment, identity, rights, limits.

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime, probe_path};
use husk_tests::processes::daemon;
use husk_tests::task::Task;
use serde_json::json;

use crate::Case;
use crate::files::DEFAULT;
use crate::shared::{Part, Ran, Shared, ran, script};
use crate::within;

pub const CASES: &[Case] = &[
    ("process::arguments", arguments),
    ("process::environment_of_128_kib", environment),
    ("process::user_with_groups", user_with_groups),
    ("process::user_by_id", user_by_id),
    ("process::working_folder", working_folder),
    ("process::capabilities", capabilities),
    ("process::capability_added_and_dropped", capability_added_and_dropped),
    ("process::privileged", privileged),
    ("process::seccomp", seccomp),
    ("process::no_new_privileges", no_new_privileges),
    ("process::limits", limits),
    ("process::umask", umask),
    ("process::hostname", hostname),
    ("process::is_the_first", is_the_first),
    ("process::masked_paths", masked_paths),
    ("process::read_only_paths", read_only_paths),
    ("process::devices", devices),
    ("process::own_cgroup", own_cgroup),
    ("process::sysctl", sysctl),
    ("process::oom_score", oom_score),
    ("process::capability_sets", capability_sets),
    ("process::without_environment", without_environment),
    ("process::search_path", search_path),
    ("process::working_folder_is_a_file", working_folder_is_a_file),
    ("process::limits_are_execs_too", limits_are_execs_too),
    ("process::device_rules", device_rules),
    ("process::set_user_id", set_user_id),
];

const CAPABILITIES: Part = Part::new("capabilities", "grep Cap /proc/self/status");
const NO_NEW_PRIVILEGES: Part = Part::new("no_new_privileges", "grep NoNewPrivs /proc/self/status");
const LIMITS: Part = Part::new("limits", "cat /proc/self/limits");
const UMASK: Part = Part::new("umask", "umask; touch /made; stat -c %a /made");
/// The shell looks by itself: how many of a pipeline's processes are there is chance.
const IS_THE_FIRST: Part = Part::by_init("is_the_first", "echo $$; set -- /proc/[0-9]*; echo $#");
const MASKED_PATHS: Part =
    Part::new("masked_paths", "wc -c < /proc/keys; ls /sys/firmware | wc -l");
const READ_ONLY_PATHS: Part = Part::new(
    "read_only_paths",
    "echo 1 > /proc/sys/vm/swappiness || echo refused; touch /sys/x || echo refused",
);
const DEVICES: Part = Part::new(
    "devices",
    "for d in null zero full random urandom tty; do stat -c '%n %t %T %a' /dev/$d; done; \
     for l in fd stdin ptmx; do readlink /dev/$l; done; head -c 4 /dev/zero | od -An -tx1; \
     echo x > /dev/full || echo full; head -c 8 /dev/urandom | wc -c",
);

/// Parts that run in an ordinary container.
pub const PARTS: [Part; 8] = [
    IS_THE_FIRST,
    CAPABILITIES,
    NO_NEW_PRIVILEGES,
    LIMITS,
    UMASK,
    MASKED_PATHS,
    READ_ONLY_PATHS,
    DEVICES,
];

const WORKING_FOLDER: Part = Part::new("working_folder", "pwd");
const ADDED_AND_DROPPED: Part = Part::new("added_and_dropped", "grep CapEff /proc/self/status");
const SECCOMP: Part = Part::new(
    "seccomp",
    "grep Seccomp: /proc/self/status; unshare -U true 2>/dev/null || echo refused",
);

/// A container with flags of `ctr` that do not touch each other.
pub static FLAGGED: Shared<Ran> = Shared::new(|runtime| {
    let run = Run::shell(runtime, &script(&[WORKING_FOLDER, ADDED_AND_DROPPED, SECCOMP]));
    let run = run.flag("--cwd").flag("/usr/not/there/yet").flag("--seccomp");
    let run = run.flag("--cap-add").flag("CAP_NET_ADMIN").flag("--cap-drop").flag("CAP_CHOWN");
    ran(&run)
});

const ALL_PRIVILEGES: Part = Part::new(
    "privileged",
    "mount -t tmpfs none /tmp && echo mounted; grep -c . /proc/self/status >/dev/null; \
     [ $((0x$(grep CapEff /proc/self/status | cut -f2) & 0x3fffffffff)) = $((0x3fffffffff)) ] \
     && echo all",
);

/// A privileged container that may have new privileges.
pub static PRIVILEGED: Shared<Ran> = Shared::new(|runtime| {
    let run = Run::shell(runtime, &script(&[ALL_PRIVILEGES, NO_NEW_PRIVILEGES]));
    ran(&run.flag("--privileged").flag("--allow-new-privs"))
});

const ENVIRONMENT: Part = Part::new(
    "environment",
    "echo ${#ONE} ${#TWO}; [ \"$ONE\" = \"$TWO\" ] && echo equal; \
     echo \"$ONE\" | sha256sum; echo \"$LINES\"",
);
const HOSTNAME: Part = Part::new("hostname", "hostname; cat /proc/sys/kernel/hostname");
const OWN_CGROUP: Part = Part::new(
    "own_cgroup",
    "cat /proc/self/cgroup; tr ' ' '\\n' < /sys/fs/cgroup/cgroup.controllers | \
     grep -c -E '^(cpu|memory|pids)$'; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max",
);
const SYSCTL: Part = Part::new(
    "sysctl",
    "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start",
);
const OOM_SCORE: Part = Part::new("oom_score", "cat /proc/self/oom_score_adj");
const DEVICE_RULES: Part = Part::new(
    "device_rules",
    "stat -c '%t %T %a %u %g' /dev/given; cd /tmp; mknod null c 1 3; mknod mem c 1 1; \
     mknod zero c 1 5; echo x > null && echo swallowed; head -c 4 mem 2>&1; \
     head -c 4 zero | wc -c; echo x 2>&1 > zero",
);

/// Half of what [`ENVIRONMENT`] is given: the kernel takes at most 128 KiB in one string, so two make up
/// the amount.
fn half() -> String {
    format!("first {} last", "abcdefg ".repeat((64 << 10) / 8))
}

/// A container with settings that only a spec has. The variables are in it too, as `ctr` takes none as long.
pub static SPECIFIED: Shared<Ran> = Shared::new(|runtime| {
    let parts = [ENVIRONMENT, HOSTNAME, OWN_CGROUP, SYSCTL, OOM_SCORE, DEVICE_RULES, UMASK];
    let run = Run::spec(runtime, &script(&parts), |spec| {
        if let Some(environment) = spec["process"]["env"].as_array_mut() {
            let half = half();
            for variable in
                [format!("ONE={half}"), format!("TWO={half}"), "LINES=a b\nc=\"d\"".into()]
            {
                environment.push(variable.into());
            }
        }
        spec["hostname"] = "inside".into();
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        let mount = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                            "options": ["ro", "nosuid", "noexec", "nodev"] });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        spec["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864 });
        spec["linux"]["resources"]["pids"] = json!({ "limit": 77 });
        spec["linux"]["sysctl"] =
            json!({ "kernel.msgmax": "16384", "net.ipv4.ip_unprivileged_port_start": "80" });
        spec["process"]["oomScoreAdj"] = 500.into();
        spec["process"]["user"]["umask"] = 0o027.into();
        let device = json!({ "path": "/dev/given", "type": "c", "major": 1, "minor": 3,
                             "fileMode": 0o640, "uid": 5, "gid": 6 });
        spec["root"]["readonly"] = false.into();
        spec["linux"]["devices"] = json!([device]);
        // Engines say it by the words with an r.
        spec["linux"]["rootfsPropagation"] = "rshared".into();
        let capabilities = json!(["CAP_MKNOD"]);
        for set in ["bounding", "permitted", "effective"] {
            spec["process"]["capabilities"][set] = capabilities.clone();
        }
    })?;
    ran(&run)
});

const SETS: Part = Part::new("sets", "grep Cap /proc/self/status");
const SET_USER_ID: Part = Part::new("set_user_id", "/bin/probe identity");

/// Puts a program of root's with the bit into a container's root.
fn put_set_user_id(spec: &serde_json::Value) {
    let root = spec["root"]["path"].as_str().unwrap_or_default();
    let program = format!("{root}/bin/probe");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    let _ = probe_path().map(|probe| std::fs::copy(probe, &program));
    let _ = std::fs::set_permissions(&program, mode);
}

/// A container of a user with capabilities, who renounces new privileges.
pub static USER: Shared<Ran> = Shared::new(|runtime| {
    let run = Run::spec(runtime, &script(&[SETS, SET_USER_ID]), |spec| {
        put_set_user_id(spec);
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_CHOWN", "CAP_KILL"],
            "ambient": ["CAP_KILL"],
        });
        spec["process"]["noNewPrivileges"] = true.into();
    })?;
    ran(&run)
});

const USER_WITH_GROUPS: Part =
    Part::new("user_with_groups", "id -u; id -g; id -G; touch /x 2>&1 || true");

/// A container of a user with groups and without capabilities, who may have new privileges.
pub static GROUPS: Shared<Ran> = Shared::new(|runtime| {
    let run = Run::spec(runtime, &script(&[USER_WITH_GROUPS, SET_USER_ID]), |spec| {
        put_set_user_id(spec);
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [27, 100] });
        spec["process"]["capabilities"] = json!({});
        spec["process"]["noNewPrivileges"] = false.into();
    })?;
    ran(&run)
});

/// Compares what has come of a part.
fn said(ran: &Ran, part: Part, wanted: &str) -> Result<()> {
    let text = part.text(ran, 0)?;
    ensure!(text == wanted, "{text:?} instead of {wanted:?}");
    Ok(())
}

fn by_default(runtime: Runtime, part: Part, wanted: &str) -> Result<()> {
    said(&DEFAULT.of(runtime)?.ran, part, wanted)
}

fn expect(run: &Run, wanted: &str) -> Result<()> {
    let text = run.finish()?.text(0)?;
    ensure!(text == wanted, "{text:?} instead of {wanted:?}");
    Ok(())
}

fn arguments(runtime: Runtime) -> Result<()> {
    let words = ["two words", "", "line\nbreak", "quote\"'\\", "$HOME *", "ümläut ☃", "--"];
    let run = Run::probe(runtime, &[&["arguments"][..], &words].concat())?;
    expect(&run, &words.map(|word| format!("{word:?}")).join("\n"))
}

fn environment(runtime: Runtime) -> Result<()> {
    let (half, text) = (half(), ENVIRONMENT.text(&*SPECIFIED.of(runtime)?, 0)?);
    let lines: Vec<&str> = text.lines().collect();
    let lengths = format!("{0} {0}", half.len());
    ensure!(lines.len() == 5 && lines[..2] == [lengths.as_str(), "equal"], "{text}");
    ensure!(lines[2] == sum(&format!("{half}\n"))? && lines[3..] == ["a b", "c=\"d\""], "{text}");
    Ok(())
}

/// What `sha256sum` prints for a text on its standard input.
fn sum(text: &str) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let output = std::process::Command::new("sha256sum").stdin(file.reopen()?).output()?;
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

fn user_with_groups(runtime: Runtime) -> Result<()> {
    let wanted = "1000\n1001\n1001 27 100\ntouch: /x: Permission denied";
    said(&*GROUPS.of(runtime)?, USER_WITH_GROUPS, wanted)
}

fn user_by_id(runtime: Runtime) -> Result<()> {
    let line = "id -u; id -g; touch /denied 2>/dev/null || echo refused; touch /tmp/mine && \
                stat -c '%u %g' /tmp/mine; grep CapEff /proc/self/status";
    let run = Run::spec(runtime, line, |spec| {
        spec["process"]["user"] = json!({ "uid": 1234, "gid": 4321 });
        let root = spec["root"]["path"].as_str().unwrap_or_default();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        let _ = std::fs::set_permissions(format!("{root}/tmp"), open);
    })?;
    expect(&run, "1234\n4321\nrefused\n1234 4321\nCapEff:\t0000000000000000")
}

fn working_folder(runtime: Runtime) -> Result<()> {
    said(&*FLAGGED.of(runtime)?, WORKING_FOLDER, "/usr/not/there/yet")
}

fn capabilities(runtime: Runtime) -> Result<()> {
    let wanted = "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\n\
                  CapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000";
    by_default(runtime, CAPABILITIES, wanted)
}

fn capability_added_and_dropped(runtime: Runtime) -> Result<()> {
    said(&*FLAGGED.of(runtime)?, ADDED_AND_DROPPED, "CapEff:\t00000000a80435fa")
}

fn privileged(runtime: Runtime) -> Result<()> {
    said(&*PRIVILEGED.of(runtime)?, ALL_PRIVILEGES, "mounted\nall")
}

fn seccomp(runtime: Runtime) -> Result<()> {
    said(&*FLAGGED.of(runtime)?, SECCOMP, "Seccomp:\t2\nrefused")
}

fn no_new_privileges(runtime: Runtime) -> Result<()> {
    by_default(runtime, NO_NEW_PRIVILEGES, "NoNewPrivs:\t1")?;
    said(&*PRIVILEGED.of(runtime)?, NO_NEW_PRIVILEGES, "NoNewPrivs:\t0")
}

fn limits(runtime: Runtime) -> Result<()> {
    let text = LIMITS.text(&DEFAULT.of(runtime)?.ran, 0)?;
    // As lines of words: the columns' widths are the kernel's business.
    let lines = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let inside = lines(&text);
    ensure!(inside.contains(&"Max open files 1024 1024 files".to_owned()), "{text}");
    // The others are not in the spec: they are containerd's, for a process that is added too.
    let daemon = daemon().context("no containerd")?;
    let wanted = lines(&std::fs::read_to_string(format!("/proc/{daemon}/limits"))?);
    let added = lines(&within::SHARED.of(runtime)?.task.shell("cat /proc/self/limits")?);
    for line in wanted.iter().filter(|line| !line.starts_with("Max open files")) {
        ensure!(inside.contains(line) && added.contains(line), "{line}: {inside:?} {added:?}");
    }
    Ok(())
}

fn umask(runtime: Runtime) -> Result<()> {
    by_default(runtime, UMASK, "0022\n644")?;
    said(&*SPECIFIED.of(runtime)?, UMASK, "0027\n640")
}

fn hostname(runtime: Runtime) -> Result<()> {
    said(&*SPECIFIED.of(runtime)?, HOSTNAME, "inside\ninside")
}

fn is_the_first(runtime: Runtime) -> Result<()> {
    by_default(runtime, IS_THE_FIRST, "1\n1")
}

fn masked_paths(runtime: Runtime) -> Result<()> {
    by_default(runtime, MASKED_PATHS, "0\n0")
}

fn read_only_paths(runtime: Runtime) -> Result<()> {
    by_default(runtime, READ_ONLY_PATHS, "refused\nrefused")
}

fn devices(runtime: Runtime) -> Result<()> {
    let wanted = "/dev/null 1 3 666\n/dev/zero 1 5 666\n/dev/full 1 7 666\n/dev/random 1 8 666\n\
                  /dev/urandom 1 9 666\n/dev/tty 5 0 666\n/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n \
                  00 00 00 00\nfull\n8";
    by_default(runtime, DEVICES, wanted)
}

fn own_cgroup(runtime: Runtime) -> Result<()> {
    said(&*SPECIFIED.of(runtime)?, OWN_CGROUP, "0::/\n3\n67108864\n77")
}

fn sysctl(runtime: Runtime) -> Result<()> {
    said(&*SPECIFIED.of(runtime)?, SYSCTL, "16384\n80")
}

fn oom_score(runtime: Runtime) -> Result<()> {
    said(&*SPECIFIED.of(runtime)?, OOM_SCORE, "500")
}

/// Each of the five sets its own, for a user who is not root.
fn capability_sets(runtime: Runtime) -> Result<()> {
    let wanted = "CapInh:\t0000000000000021\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
                  CapBnd:\t0000000000002021\nCapAmb:\t0000000000000020";
    said(&*USER.of(runtime)?, SETS, wanted)
}

fn put(spec: &serde_json::Value, path: &str, text: &str) {
    let root = spec["root"]["path"].as_str().unwrap_or_default();
    let _ = std::fs::write(format!("{root}/{path}"), text);
}

/// The only variable of a process that is given none is its home, which the image's users have.
fn without_environment(runtime: Runtime) -> Result<()> {
    let run = Run::spec(runtime, "", |spec| {
        put(spec, "etc/passwd", "root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/home/of-u:/bin/sh\n");
        spec["process"]["args"] = json!(["/bin/busybox", "env"]);
        spec["process"]["env"] = json!([]);
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    })?;
    expect(&run, "HOME=/home/of-u")
}

/// Folders that are not there, and files that cannot be executed, are passed over.
fn search_path(runtime: Runtime) -> Result<()> {
    let run = Run::spec(runtime, "echo found by $PATH", |spec| {
        put(spec, "etc/sh", "not a program");
        spec["process"]["env"] = json!(["PATH=/no/such:/etc:/etc/sh:/bin"]);
    })?;
    expect(&run, "found by /no/such:/etc:/etc/sh:/bin")?;
    let run = Run::spec(runtime, "true", |spec| {
        spec["process"]["env"] = json!(["PATH=/no/such:/etc"]);
    })?;
    let finished = run.finish()?;
    let wanted = r#"exec: "sh": executable file not found in $PATH"#;
    ensure!(finished.code == 1 && finished.stderr.contains(wanted), "{finished:?}");
    Ok(())
}

fn working_folder_is_a_file(runtime: Runtime) -> Result<()> {
    let finished = Run::new(runtime, &["pwd"]).flag("--cwd").flag("/etc/passwd").finish()?;
    let said = finished.stderr.contains("/etc/passwd: not a directory");
    ensure!(finished.code == 1 && said, "{finished:?}");
    Ok(())
}

fn limits_are_execs_too(runtime: Runtime) -> Result<()> {
    let kinds = [
        // runc of Debian 12 raises the soft limit for processes that are added.
        ("NOFILE", 200, 200, "Max open files"),
        ("NPROC", 300, 400, "Max processes"),
        ("FSIZE", 1 << 20, 1 << 21, "Max file size"),
        ("STACK", 1 << 20, 1 << 22, "Max stack size"),
        ("MEMLOCK", 0, 4096, "Max locked memory"),
        ("NICE", 5, 6, "Max nice priority"),
    ];
    let run = Run::spec(runtime, "sleep 1000", |spec| {
        let limit = |(kind, soft, hard, _): &(&str, u64, u64, &str)| json!({ "type": format!("RLIMIT_{kind}"), "soft": soft, "hard": hard });
        spec["process"]["rlimits"] = kinds.iter().map(limit).collect();
    })?;
    let task = Task::start(run)?;
    for who in ["1", "self"] {
        let text = task.shell(&format!("cat /proc/{who}/limits"))?;
        for (_, soft, hard, name) in kinds {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let mut words = line.unwrap_or_default().split_whitespace();
            let seen = (words.next(), words.next());
            let (soft, hard) = (soft.to_string(), hard.to_string());
            ensure!(seen == (Some(&*soft), Some(&*hard)), "{name} of {who}: {text}");
        }
    }
    Ok(())
}

/// Nodes can be made of every device, and only those that the rules allow can be used.
fn device_rules(runtime: Runtime) -> Result<()> {
    let ran = SPECIFIED.of(runtime)?;
    let wanted = "1 3 640 5 6\nswallowed\nhead: mem: Operation not permitted\n4";
    said(&ran, DEVICE_RULES, wanted)
}

/// A program of root's with the bit is root's, unless new privileges are renounced.
fn set_user_id(runtime: Runtime) -> Result<()> {
    said(&*USER.of(runtime)?, SET_USER_ID, "1000 1000")?;
    said(&*GROUPS.of(runtime)?, SET_USER_ID, "1000 0")
}
