//! Pods: several containers in one sandbox, as Kubernetes has them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::client::task_in;
use husk_tests::containerd::{BUSYBOX, PROBE, Runtime, ctr, probe_path};
use husk_tests::cri::{Inside, Pod, RUNNING, Wanted};
use husk_tests::processes::{Role, find};
use husk_tests::streaming::{STDERR, STDIN, STDOUT};
use husk_tests::wait::{PATIENCE, until_true};
use k8s_cri::v1::{ContainerStats, LinuxContainerResources};

use crate::Case;
use crate::mounts::Mounted;
use crate::shared::Shared;

pub const CASES: &[Case] = &[
    ("pods::two_containers_and_an_init", two_and_an_init),
    ("pods::annotations_place_nobody", annotations_place_nobody),
    ("pods::exec_sync", exec_sync),
    ("pods::streams", streams),
    ("pods::port_forward", port_forward),
    ("pods::logs", logs),
    ("pods::ends_are_told", ends),
    ("pods::out_of_memory", out_of_memory),
    ("pods::limits_and_their_update", limits),
    ("pods::containers_come_and_go", come_and_go),
    ("pods::shared_process_ids", shared_process_ids),
    ("pods::settings_of_the_sandbox", settings),
    ("pods::stop_ends_everything", stop),
    ("pods::outlives_its_pause_container", outlives_its_pause_container),
    ("pods::mounted_later", mounted_later),
    ("pods::share_under_attack", share_under_attack),
];

/// The rows for a sandbox without a pause container: what is not the containers' own.
pub const OF_A_SANDBOX: &[Case] = &[
    ("pods::two_containers_and_an_init", two_and_an_init),
    ("pods::limits_and_their_update", limits),
    ("pods::containers_come_and_go", come_and_go),
    ("pods::shared_process_ids", shared_process_ids),
    ("pods::settings_of_the_sandbox", settings),
    ("pods::stop_ends_everything", stop),
];

/// The row that says whether a version of containerd gets along with pods at all.
pub const OF_EACH_VERSION: &[Case] = &[("pods::two_containers_and_an_init", two_and_an_init)];

/// An ordinary pod, for rows whose containers do not mind others beside them.
pub static POD: Shared<Pod> = Shared::new(|runtime| Pod::run(runtime, &Wanted::default()));

/// A pod with settings of its own, and its only container.
pub static SET: Shared<(Pod, String)> = Shared::new(|runtime| {
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "99")];
    let sysctls: HashMap<String, String> =
        sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let servers = vec!["10.1.2.3".to_owned(), "10.1.2.4".to_owned()];
    let pod =
        Pod::run(runtime, &Wanted { cgroup: "/husk-pods", sysctls, servers, ..Wanted::default() })?;
    let limits = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    let id = pod.container(&Inside { limits: Some(limits), ..sleeping("limited") })?;
    Ok((pod, id))
});

/// A container that does nothing.
pub fn sleeping<'a>(name: &'a str) -> Inside<'a> {
    Inside { name, line: "sleep 1000", ..Inside::default() }
}

/// An init container prepares a volume; the others talk over it, over a socket in it, over shared
/// memory and over the loopback device, and stay apart in everything else.
fn two_and_an_init(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let volume = pod.folder.path().join("volume");
    std::fs::create_dir(&volume)?;
    let probe = PathBuf::from(probe_path()?);
    let with = |name, line| Inside {
        name,
        line,
        volumes: vec![(volume.clone(), "/shared"), (probe.clone(), PROBE)],
        ..Inside::default()
    };
    let init = pod.container(&with("init", "echo prepared > /shared/file"))?;
    ensure!(pod.ended(&init)?.exit_code == 0);
    let line = "httpd -p 127.0.0.1:7777 -h /shared; exec /probe listen /shared/socket";
    let server = pod.container(&with("server", line))?;
    let client = pod.container(&with("client", "sleep 1000"))?;
    ensure!(pod.shell(&client, "cat /shared/file")? == "prepared");
    pod.shell(&server, "echo changed > /shared/file; echo memory > /dev/shm/file")?;
    ensure!(pod.shell(&client, "cat /shared/file /dev/shm/file")? == "changed\nmemory");
    let names = "hostname; readlink /proc/self/ns/uts; readlink /proc/self/ns/ipc; \
                 readlink /proc/self/ns/net";
    let (one, other) = (pod.shell(&server, names)?, pod.shell(&client, names)?);
    ensure!(one == other && one.starts_with(runtime.name()), "{one} {other}");
    let own = "readlink /proc/self/ns/mnt; readlink /proc/self/ns/pid";
    let (one, other) = (pod.shell(&server, own)?, pod.shell(&client, own)?);
    ensure!(one.lines().zip(other.lines()).all(|(a, b)| a != b), "{one} {other}");
    ensure!(pod.shell(&client, "ps | grep -c '[p]robe listen' || true")? == "0");
    ensure!(pod.shell(&client, "wget -q -O - http://127.0.0.1:7777/file")? == "changed");
    ensure!(pod.shell(&client, "/probe connect /shared/socket hello")? == "hello");
    Ok(())
}

/// A container that only an annotation places in a pod, which its maker writes, is not let in. runc's shim
/// takes it: there it shares that shim, and nothing of the pod's.
fn annotations_place_nobody(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let id = format!("{}-intruder", runtime.name());
    for kind in ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"] {
        let sandbox = format!("{kind}={}", pod.id);
        let kind = "io.kubernetes.cri.container-type=container";
        // As the CRI labels its own.
        let label = "io.cri-containerd.kind=container";
        let mut words = vec!["--namespace", "k8s.io", "run", "--rm", "--runtime", runtime.shim()];
        words.extend(["--annotation", &sandbox, "--annotation", kind, "--label", label]);
        words.extend([BUSYBOX, &id, "true"]);
        match ctr(&words) {
            Ok(_) => ensure!(runtime == Runtime::Runc, "it was let in"),
            Err(error) if runtime == Runtime::Runc => return Err(error),
            Err(error) => {
                let error = format!("{error:#}");
                ensure!(error.contains(&format!("cannot join sandbox {}", pod.id)), "{error}");
            }
        }
    }
    Ok(())
}

fn exec_sync(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let id = pod.container(&sleeping("exec"))?;
    let ran = pod.exec(&id, "echo out; echo err >&2; exit 3", 0)?;
    ensure!((ran.exit_code, &*ran.stdout, &*ran.stderr) == (3, b"out\n", b"err\n"), "{ran:?}");
    let late = pod.exec(&id, "echo begun; sleep 1000", 3).err().context("it ended")?;
    ensure!(format!("{late:#}").contains("timeout 3s exceeded"), "{late:#}");
    // What was too late has been ended.
    ensure!(pod.shell(&id, "ps | grep -c '[s]leep 1000'")? == "1");
    Ok(())
}

/// Exec and attach through the stream server.
fn streams(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let line = "while read line; do echo got $line; echo err $line >&2; done";
    let id = pod.container(&Inside { name: "streams", line, stdin: true, ..Inside::default() })?;

    let mut exec =
        pod.exec_stream(&id, "echo out; echo err >&2; read x; echo $x; exit 3", false)?;
    exec.until(STDOUT, "out\n")?;
    exec.until(STDERR, "err\n")?;
    exec.send(STDIN, b"hello\n")?;
    ensure!(exec.exit_code()? == 3, "{exec:?}");
    ensure!((&*exec.came(STDOUT), &*exec.came(STDERR)) == ("out\nhello\n", "err\n"), "{exec:?}");
    ensure!(pod.exec_stream(&id, "true", false)?.exit_code()? == 0);

    let line = "tty; until [ \"$(stty size)\" = '33 101' ]; do sleep 0.1; done; echo sized; cat";
    let mut exec = pod.exec_stream(&id, line, true)?;
    exec.until(STDOUT, "/dev/pts/")?;
    exec.resize(101, 33)?;
    exec.until(STDOUT, "sized\r\n")?;
    // Control-C ends it as at any terminal.
    exec.send(STDIN, b"\x03")?;
    ensure!(exec.exit_code()? == 130, "{exec:?}");

    for word in ["first", "second"] {
        let mut attached = pod.attach(&id)?;
        attached.send(STDIN, format!("{word}\n").as_bytes())?;
        attached.until(STDOUT, &format!("got {word}\n"))?;
        attached.until(STDERR, &format!("err {word}\n"))?;
        // Who leaves takes nothing along.
        drop(attached);
        pod.logs("streams", &format!("stdout got {word}"))?;
    }
    ensure!(pod.status(&id)?.state == RUNNING);
    Ok(())
}

/// containerd dials the port in the pod's network namespace on the host.
fn port_forward(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let line = "echo served > /tmp/file; exec httpd -f -p 127.0.0.1:8080 -h /tmp";
    let id = pod.container(&Inside { name: "served", line, ..Inside::default() })?;
    pod.shell(&id, "until wget -q -O /dev/null http://127.0.0.1:8080/file; do sleep 0.1; done")?;
    for _ in 0..3 {
        let mut port = pod.port_forward(8080)?;
        port.send(STDIN, b"GET /file HTTP/1.0\r\n\r\n")?;
        port.until(STDIN, "served\n")?;
    }
    // Nobody listens: the second channel is for errors. Husk has taken the connection by then.
    let error = if runtime == Runtime::Runc { "connection refused" } else { "connection reset" };
    pod.port_forward(9090)?.until(STDOUT, error)
}

fn logs(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let line = "echo first; echo error >&2; until [ -e /tmp/go ]; do sleep 0.1; done; echo second; sleep 1000";
    let id = pod.container(&Inside { name: "logs", line, ..Inside::default() })?;
    pod.logs("logs", "stdout first")?;
    pod.logs("logs", "stderr error")?;
    let path = pod.folder.path().join("logs.log");
    std::fs::rename(&path, pod.folder.path().join("logs.rotated"))?;
    pod.reopen_log(&id)?;
    pod.shell(&id, "touch /tmp/go")?;
    pod.logs("logs", "stdout second")?;
    ensure!(pod.log("logs")? == ["stdout second"], "{:?}", pod.log("logs"));
    Ok(())
}

fn ends(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    for (line, code, reason) in [("exit 0", 0, "Completed"), ("exit 5", 5, "Error")] {
        let id = pod.container(&Inside { name: "ends", line, ..Inside::default() })?;
        let status = pod.ended(&id)?;
        ensure!((status.exit_code, &*status.reason) == (code, reason), "{status:?}");
        // As the start counts the daemon's time when the call returned, which may be after the end.
        let first = status.created_at;
        ensure!(
            first > 0 && status.started_at >= first && status.finished_at >= first,
            "{status:?}"
        );
    }
    let id = pod.container(&sleeping("stopped"))?;
    pod.stop(&id, 1)?;
    let status = pod.ended(&id)?;
    ensure!(status.exit_code == 137, "{status:?}");
    let missing = Inside { name: "missing", line: "", ..Inside::default() };
    let id = pod.create(&missing)?;
    pod.remove(&id)?;
    ensure!(pod.status(&id).is_err());
    ensure!(pod.is_ready()?);
    Ok(())
}

/// A limit of memory.
pub fn memory(bytes: i64) -> Option<LinuxContainerResources> {
    Some(LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() })
}

fn out_of_memory(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let inside = Inside {
        name: "greedy",
        line: "exec tail -c 200m /dev/zero",
        limits: memory(32 << 20),
        ..Inside::default()
    };
    let id = pod.container(&inside)?;
    let status = pod.ended(&id)?;
    ensure!((status.exit_code, &*status.reason) == (137, "OOMKilled"), "{status:?}");
    Ok(())
}

fn limits(runtime: Runtime) -> Result<()> {
    let set = SET.of(runtime)?;
    let (pod, id) = &*set;
    let look = "cd /sys/fs/cgroup; cat cpu.max memory.max";
    let weight =
        || Ok::<u32, anyhow::Error>(pod.shell(id, "cat /sys/fs/cgroup/cpu.weight")?.parse()?);
    let seen = pod.shell(id, look)?;
    ensure!(seen == "50000 100000\n67108864", "{seen}");
    let before = weight()?;
    let limits = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 25_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    pod.update(id, limits)?;
    let seen = pod.shell(id, look)?;
    ensure!(seen == "25000 100000\n100663296", "{seen}");
    ensure!(weight()? > before, "{before}, then {}", weight()?);
    let cpus = |cpus: &str| LinuxContainerResources {
        cpuset_cpus: cpus.to_owned(),
        cpuset_mems: "0".to_owned(),
        ..Default::default()
    };
    pod.update(id, cpus("0"))?;
    // Of the container's processes, or of the machine that they are in.
    let pid = task_in("k8s.io", id)?.pid;
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let own = Path::new("/sys/fs/cgroup").join(own.trim().trim_start_matches("0::/"));
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let set = fs::read_to_string(own.join(file)).with_context(|| format!("{own:?}"))?;
        ensure!(set.trim() == "0", "{file}: {set}");
    }
    let error = pod.update(id, cpus("0,4000")).err().context("there is a CPU 4000")?;
    ensure!(format!("{error:#}").contains("cpus"), "{error:#}");
    let stats = pod.stats(id)?;
    let listed = pod.list_stats()?;
    let name = |stats: &ContainerStats| stats.attributes.as_ref().map(|one| one.id.clone());
    ensure!(listed.len() == 1 && name(&listed[0]) == Some(id.clone()), "{listed:?}");
    let of_pod = pod.sandbox_stats()?.linux.context("no stats of the pod")?;
    let used = of_pod.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |v| v.value);
    ensure!(used > 0, "the pod uses no memory");
    ensure!(of_pod.containers.iter().any(|one| name(one) == Some(id.clone())), "{of_pod:?}");
    let used = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |v| v.value);
    ensure!((1..96 << 20).contains(&used), "{used}");
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |v| v.value);
    ensure!(cpu > 0, "no use of the processor");
    Ok(())
}

/// The sandbox lives on whatever its containers do.
fn come_and_go(runtime: Runtime) -> Result<()> {
    let pod = Pod::run(runtime, &Wanted::default())?;
    let first = pod.container(&sleeping("first"))?;
    let second = pod.container(&sleeping("second"))?;
    pod.stop(&first, 0)?;
    pod.remove(&first)?;
    ensure!(pod.status(&second)?.state == RUNNING);
    let again = pod.container(&sleeping("first"))?;
    ensure!(pod.shell(&again, "echo again")? == "again");
    pod.stop(&second, 0)?;
    pod.remove(&second)?;
    pod.stop(&again, 0)?;
    pod.remove(&again)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(pod.is_ready()?);
    let last = pod.container(&sleeping("last"))?;
    ensure!(pod.shell(&last, "echo last")? == "last");
    Ok(())
}

/// A volume whose file system was mounted after its pod's start, on a host whose `/` is private, and one
/// beneath it that comes later still.
fn mounted_later(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let volume = pod.folder.path().join("later");
    std::fs::create_dir(&volume)?;
    let _outer = Mounted::tmpfs(volume.clone())?;
    std::fs::write(volume.join("file"), "later\n")?;
    std::fs::create_dir(volume.join("beneath"))?;
    let id = pod.container(&Inside {
        volumes: vec![(volume.clone(), "/private")],
        followed: vec![(volume.clone(), "/followed")],
        ..sleeping("later")
    })?;
    ensure!(pod.shell(&id, "cat /private/file /followed/file")? == "later\nlater");
    let _inner = Mounted::tmpfs(volume.join("beneath"))?;
    std::fs::write(volume.join("beneath/file"), "beneath\n")?;
    let text = pod.shell(&id, "cat /followed/beneath/file; ls /private/beneath | wc -l")?;
    ensure!(text == "beneath\n0", "{text}");
    pod.stop(&id, 0)?;
    pod.remove(&id)
}

/// What a guest can do to the shared folder, if there is one: it mounts it once more, and exchanges what
/// it finds for links to the folder `CANARY`.
const HAMMER: &str = "mkdir /m; mount -t virtiofs husk /m; while :; do \
    for folder in /m /m/.volumes /m/*; do ln -s CANARY $folder/planted; \
    for name in .volumes rootfs 0 1 2 3 4 5 6 7 8 9; do \
    mv $folder/$name $folder/moved; mv $folder/planted $folder/$name; \
    ln -s CANARY $folder/$name; rmdir $folder/$name; done; done; done 2>/dev/null";

/// Containers with volumes come and go in a pod whose guest hammers on the shared folder.
fn share_under_attack(runtime: Runtime) -> Result<()> {
    let pod = Pod::run(runtime, &Wanted::default())?;
    let [canary, volume] = ["canary", "volume"].map(|name| pod.folder.path().join(name));
    for folder in [&canary, &volume] {
        std::fs::create_dir(folder)?;
        std::fs::write(folder.join("file"), "untouched\n")?;
    }
    let hammer = HAMMER.replace("CANARY", &canary.display().to_string());
    let hammer = pod.container(&Inside {
        name: "hammer",
        line: &hammer,
        capabilities: vec!["SYS_ADMIN"],
        ..Inside::default()
    })?;
    // The folder may not be there yet.
    let shared = || Ok(pod.shell(&hammer, "ls -A /m || true")?.contains(".volumes"));
    if runtime == Runtime::Husk {
        until_true("the guest sees the shared folder", PATIENCE, shared)?;
    }
    for _ in 0..3 {
        let volumes = vec![(volume.clone(), "/volume")];
        let id = pod.container(&Inside { volumes, ..sleeping("beside") })?;
        ensure!(pod.shell(&id, "cat /volume/file")? == "untouched");
        pod.stop(&id, 0)?;
        pod.remove(&id)?;
    }
    for folder in [&canary, &volume] {
        let names: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|e| e.file_name()).collect();
        ensure!(names == ["file"], "{names:?} in {}", folder.display());
        ensure!(std::fs::read_to_string(folder.join("file"))? == "untouched\n");
    }
    let mut tables = vec!["/proc/self/mountinfo".to_owned()];
    let shim = find(Role::Shim, &pod.id).map(|pid| format!("/proc/{pid}/mountinfo"));
    tables.extend(shim.filter(|_| runtime == Runtime::Husk));
    let canary = canary.display().to_string();
    for table in tables {
        let text = std::fs::read_to_string(&table)?;
        let there = text.lines().find(|line| line.contains(&canary));
        ensure!(there.is_none(), "{there:?} in {table}");
    }
    Ok(())
}

fn shared_process_ids(runtime: Runtime) -> Result<()> {
    let pod = Pod::run(runtime, &Wanted { shared_pids: true, ..Wanted::default() })?;
    let one = pod.container(&Inside { name: "one", line: "sleep 1001", ..Inside::default() })?;
    let other =
        pod.container(&Inside { name: "other", line: "sleep 1002", ..Inside::default() })?;
    let own = "readlink /proc/self/ns/pid";
    ensure!(pod.shell(&one, own)? == pod.shell(&other, own)?);
    let seen = pod.shell(&other, "ps | grep -o '[s]leep 100[12]' | sort")?;
    ensure!(seen == "sleep 1001\nsleep 1002", "{seen}");
    pod.shell(&other, "kill -9 $(ps | awk '/[s]leep 1001/ { print $1 }')")?;
    ensure!(pod.ended(&one)?.exit_code == 137);
    ensure!(pod.status(&other)?.state == RUNNING);
    Ok(())
}

fn settings(runtime: Runtime) -> Result<()> {
    let set = SET.of(runtime)?;
    let (pod, id) = &*set;
    let look = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                hostname; cat /etc/hostname; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2";
    let seen = pod.shell(id, look)?;
    let names = pod
        .shell(id, "grep nameserver /etc/resolv.conf; grep -o -w localhost /etc/hosts | head -1")?;
    ensure!(names == "nameserver 10.1.2.3\nnameserver 10.1.2.4\nlocalhost", "{names}");
    let lines: Vec<_> = seen.lines().collect();
    ensure!(lines[..2] == ["1", "99"] && lines[2] == lines[3] && lines[4] == "65536", "{seen}");
    Ok(())
}

fn stop(runtime: Runtime) -> Result<()> {
    let pod = Pod::run(runtime, &Wanted::default())?;
    let one = pod.container(&sleeping("one"))?;
    let other = pod.container(&sleeping("other"))?;
    pod.stop_sandbox()?;
    ensure!(!pod.is_ready()?);
    for id in [one, other] {
        ensure!(pod.ended(&id)?.exit_code == 137);
    }
    // Once more is no error.
    pod.stop_sandbox()
}

/// How soon the host's OOM killer takes the process that containerd knows of a container in a pod.
fn oom_score(id: &str) -> Result<i32> {
    let pid = task_in("k8s.io", id)?.pid;
    Ok(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?)
}

/// The pause container is killed: the pod is not ready any more, and its containers go on. Before that,
/// what the host's OOM killer thinks of each: the pause container goes last.
fn outlives_its_pause_container(runtime: Runtime) -> Result<()> {
    let pod = Pod::run(runtime, &Wanted::default())?;
    ensure!(oom_score(&pod.id)? == -998, "{}", oom_score(&pod.id)?);
    let with = |name, score| Inside {
        limits: Some(LinuxContainerResources { oom_score_adj: score, ..Default::default() }),
        ..sleeping(name)
    };
    let first = pod.container(&with("first", 321))?;
    ensure!(oom_score(&first)? == 321, "{}", oom_score(&first)?);
    let last = pod.container(&with("last", 7))?;
    ensure!(oom_score(&first)? == 321, "{}", oom_score(&first)?);
    pod.stop(&first, 0)?;
    pod.remove(&first)?;
    ensure!(oom_score(&last)? == 7, "{}", oom_score(&last)?);
    ctr(&["-n", "k8s.io", "task", "kill", "--signal", "SIGKILL", &pod.id])?;
    until_true("the pod is not ready", PATIENCE, || Ok(!pod.is_ready()?))?;
    // Its task is deleted then, and whatever the shim does about that has had time.
    std::thread::sleep(Duration::from_secs(3));
    ensure!(pod.status(&last)?.state == RUNNING, "{:?}", pod.status(&last)?);
    ensure!(pod.shell(&last, "echo alive")? == "alive");
    pod.stop_sandbox()?;
    ensure!(pod.ended(&last)?.exit_code == 137);
    Ok(())
}
