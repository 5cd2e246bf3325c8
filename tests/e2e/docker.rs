//! Docker: on the one whose folder `DOCKER` names, with the runtimes `runc` and `husk`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Finished, Runtime, finish, start};
use husk_tests::leftovers::{Listing, nothing_left};
use husk_tests::wait::{CLEAN_UP, PATIENCE, until_true};
use libtest_mimic::Arguments;

use crate::{Case, trials};

const CASES: &[Case] = &[
    ("docker::run", run_to_its_end),
    ("docker::options", options),
    ("docker::volumes", volumes),
    ("docker::life", life),
    ("docker::published_port", published_port),
    ("docker::networks_come_and_go", networks),
    ("docker::names", names),
    ("docker::no_network", no_network),
];

const HUSK_CASES: &[Case] = &[
    ("docker::hosts_network", hosts_network),
    ("docker::devices_of_the_host", devices_of_the_host),
    ("docker::flavours", flavours),
];

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Whether Docker is up, and its rows are to be run.
pub fn wanted() -> bool {
    std::env::var("DOCKER").is_ok_and(|folder| !folder.is_empty())
}

/// Runs everything here.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut all = trials(CASES, &[Runtime::Runc, Runtime::Husk]);
    all.extend(trials(HUSK_CASES, &[Runtime::Husk]));
    // One by one: each looks at what it leaves.
    let arguments = Arguments { test_threads: Some(1), ..arguments.clone() };
    if libtest_mimic::run(&arguments, all).has_failed() {
        std::process::exit(101);
    }
    Ok(())
}

fn docker(words: &[&str]) -> Result<Finished> {
    let mut child = start(Command::new("docker").args(words))?;
    drop(child.stdin.take());
    finish(child).with_context(|| format!("docker {}", words.join(" ")))
}

/// What a command that must succeed prints.
fn ok(words: &[&str]) -> Result<String> {
    docker(words)?.text(0).with_context(|| format!("docker {}", words.join(" ")))
}

/// `docker run --rm` of a shell line.
fn once(runtime: Runtime, flags: &[&str], line: &str) -> Result<Finished> {
    let fixed = ["run", "--rm", "--runtime", runtime.name()];
    docker(&[&fixed, flags, &["busybox", "sh", "-c", line]].concat())
}

/// A container that runs; dropping removes it.
struct Running(String);

impl Running {
    fn start(runtime: Runtime, flags: &[&str], line: &str) -> Result<Self> {
        let running = Self(format!("{}-{}", runtime.name(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let fixed = ["run", "--detach", "--runtime", runtime.name(), "--name", &running.0];
        ok(&[&fixed, flags, &["busybox", "sh", "-c", line]].concat())?;
        Ok(running)
    }

    fn shell(&self, line: &str) -> Result<String> {
        ok(&["exec", &self.0, "sh", "-c", line])
    }

    fn inspect(&self, what: &str) -> Result<String> {
        ok(&["inspect", "--format", what, &self.0])
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = docker(&["rm", "--force", "--volumes", &self.0]);
    }
}

/// A network of Docker's; dropping removes it.
struct Network(String);

impl Network {
    fn create(flags: &[&str]) -> Result<Self> {
        let name = format!("network-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        ok(&[&["network", "create"], flags, &[&name]].concat())?;
        Ok(Self(name))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = docker(&["network", "rm", &self.0]);
    }
}

/// Does `work` and sees to it that nothing is left of it.
fn leaves_nothing(runtime: Runtime, work: impl FnOnce() -> Result<()>) -> Result<()> {
    // What is made once and stays is made by this one.
    once(runtime, &[], "true")?.text(0)?;
    let before = Listing::now()?;
    work()?;
    nothing_left(&before, 2 * CLEAN_UP)
}

fn run_to_its_end(runtime: Runtime) -> Result<()> {
    leaves_nothing(runtime, || {
        let finished = once(runtime, &[], "echo out; echo err >&2; exit 7")?;
        ensure!(finished.text(7)? == "out" && finished.stderr == "err\n", "{finished:?}");
        let missing =
            docker(&["run", "--rm", "--runtime", runtime.name(), "busybox", "nothing-such"])?;
        ensure!(missing.code == 127 && missing.stderr.contains("nothing-such"), "{missing:?}");
        let mut child = start(Command::new("docker").args([
            "run",
            "--rm",
            "--interactive",
            "--runtime",
            runtime.name(),
            "busybox",
            "wc",
            "-c",
        ]))?;
        let mut input = child.stdin.take().context("no stdin")?;
        input.write_all(&vec![b'x'; 100_000])?;
        drop(input);
        ensure!(finish(child)?.text(0)? == "100000");
        let terminal = once(runtime, &["--tty"], "test -t 1 && echo yes")?.text(0)?;
        ensure!(terminal == "yes", "{terminal}");
        Ok(())
    })
}

/// What the command line says of a container is so inside.
fn options(runtime: Runtime) -> Result<()> {
    let flags = [
        "--env=A=b c",
        "--user=1000:2000",
        "--group-add=3000",
        "--workdir=/tmp",
        "--hostname=named",
        "--add-host=other:192.0.2.7",
        "--read-only",
        "--tmpfs=/scratch:size=1m",
        "--shm-size=8m",
        "--ulimit=nofile=123:456",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--memory=64m",
        "--pids-limit=50",
        "--cpus=0.5",
        "--sysctl=net.core.somaxconn=77",
        "--init",
    ];
    let line = "echo $A; id -u; id -g; id -G; pwd; hostname; grep other /etc/hosts; \
        touch /file 2>/dev/null || echo read-only; df -k /scratch | awk 'NR == 2 { print $2 }'; \
        df -k /dev/shm | awk 'NR == 2 { print $2 }'; ulimit -Sn; ulimit -Hn; \
        awk '/CapEff|NoNewPrivs|Seccomp:/ { print $2 }' /proc/self/status; \
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; \
        cat /proc/sys/net/core/somaxconn /proc/1/comm";
    let expected = "b c\n1000\n2000\n2000 3000\n/tmp\nnamed\n192.0.2.7\tother\nread-only\n1024\n8192\n\
        123\n456\n0000000000000000\n1\n2\n67108864\n50\n50000 100000\n77\ndocker-init";
    let said = once(runtime, &flags, line)?.text(0)?;
    let said = said.replacen("A=b c", "b c", 1);
    ensure!(said == expected, "{said}");
    let given = "--device=/dev/null:/dev/given:rw";
    let given = once(runtime, &[given], "stat -c '%t %T' /dev/given; echo x >/dev/given")?;
    ensure!(given.text(0)? == "1 3", "{given:?}");
    let privileged =
        once(runtime, &["--privileged"], "awk '/CapEff/ { print $2 }' /proc/self/status")?;
    let all = u64::from_str_radix(&privileged.text(0)?, 16)?;
    ensure!(all & 1 << 21 != 0, "no CAP_SYS_ADMIN: {all:x}");
    Ok(())
}

/// Folders of the host, volumes of Docker's, `docker cp`, `diff` and `commit`.
fn volumes(runtime: Runtime) -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("there"), "of the host")?;
    let path = folder.path().to_str().context("no text")?;
    let volume = format!("volume-{}", runtime.name());
    let (bind, named) = (format!("{path}:/host"), format!("{volume}:/kept"));
    let flags = ["--volume", &bind, "--volume", &named];
    once(runtime, &flags, "cat /host/there >/kept/copy && echo new >/host/back")?.text(0)?;
    ensure!(std::fs::read_to_string(folder.path().join("back"))? == "new\n");
    let running = Running::start(runtime, &["--volume", &named], "sleep 1000")?;
    ensure!(running.shell("cat /kept/copy")? == "of the host");
    // Into the running container's root file system, and out of it.
    let inside = format!("{}:/tmp/copied", running.0);
    ok(&["cp", &format!("{path}/there"), &inside])?;
    ensure!(running.shell("cat /tmp/copied")? == "of the host");
    ok(&["exec", "--detach", &running.0, "sh", "-c", "while :; do [ -e /tmp/late-3 ]; done"])?;
    for number in 0..4 {
        // The next command sees the name that the container has just looked for.
        let late = format!("/tmp/late-{number}");
        running.shell(&format!("[ ! -e {late} ]"))?;
        ok(&["cp", &format!("{path}/there"), &format!("{}:{late}", running.0)])?;
        ensure!(running.shell(&format!("cat {late}"))? == "of the host");
    }
    running.shell("echo more >>/tmp/copied")?;
    let out = folder.path().join("out");
    ok(&["cp", &inside, out.to_str().context("no text")?])?;
    ensure!(std::fs::read_to_string(&out)? == "of the hostmore\n");
    ensure!(ok(&["diff", &running.0])?.contains("A /tmp/copied"));
    let image = format!("{}-committed", runtime.name());
    ok(&["commit", &running.0, &image])?;
    let fixed = ["run", "--rm", "--runtime", runtime.name(), &image];
    let committed = ok(&[&fixed[..], &["cat", "/tmp/copied"]].concat())?;
    ensure!(committed == "of the hostmore", "{committed}");
    ok(&["rmi", &image])?;
    drop(running);
    ok(&["volume", "rm", &volume]).map(drop)
}

fn life(runtime: Runtime) -> Result<()> {
    leaves_nothing(runtime, || {
        let line = "trap 'echo told; exit 5' TERM; echo begun; while :; do sleep 0.1; done";
        let flags = [
            "--memory=64m",
            "--log-driver=local",
            "--health-cmd=test -e /tmp/well",
            "--health-interval=1s",
            "--health-start-period=60s",
        ];
        let running = Running::start(runtime, &flags, line)?;
        until_true("the log has it", PATIENCE, || Ok(ok(&["logs", &running.0])? == "begun"))?;
        // One line of titles, then all processes of the container, or the machine that stands for them.
        ensure!(ok(&["top", &running.0])?.lines().count() >= 2);
        ensure!(running.inspect("{{.State.Health.Status}}")? == "starting");
        running.shell("touch /tmp/well")?;
        until_true("it is healthy", PATIENCE, || {
            Ok(running.inspect("{{.State.Health.Status}}")? == "healthy")
        })?;
        ensure!(running.shell("cat /sys/fs/cgroup/memory.max")? == "67108864");
        ok(&["update", "--memory=96m", "--memory-swap=-1", &running.0])?;
        ensure!(running.shell("cat /sys/fs/cgroup/memory.max")? == "100663296");
        let exec = docker(&[
            "exec",
            "--user=7",
            "--env=X=y",
            &running.0,
            "sh",
            "-c",
            "id -u; echo $X; exit 3",
        ])?;
        ensure!(exec.text(3)? == "7\ny", "{exec:?}");
        ok(&["pause", &running.0])?;
        ensure!(running.inspect("{{.State.Status}}")? == "paused");
        ok(&["unpause", &running.0])?;
        let stats = ok(&["stats", "--no-stream", "--format={{.PIDs}} {{.MemUsage}}", &running.0])?;
        ensure!(stats.contains("96MiB") && !stats.starts_with("0 "), "{stats}");
        ok(&["restart", &running.0])?;
        until_true("it has begun again", PATIENCE, || {
            Ok(ok(&["logs", &running.0])? == "begun\ntold\nbegun")
        })?;
        ok(&["stop", &running.0])?;
        ensure!(running.inspect("{{.State.Status}} {{.State.ExitCode}}")? == "exited 5");
        ok(&["start", &running.0])?;
        ok(&["kill", &running.0])?;
        ensure!(ok(&["wait", &running.0])? == "137");
        // One whose memory is too little for what it does.
        let greedy = once(runtime, &["--memory=16m", "--memory-swap=16m"], "tail /dev/zero")?;
        ensure!(greedy.code == 137, "{greedy:?}");
        Ok(())
    })
}

/// The page that is served at `address`, a host and a port.
fn page(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, page) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
    Ok(page.trim_end().to_owned())
}

const SERVER: &str = "echo page >/tmp/index.html; exec httpd -f -p 80 -h /tmp";

fn published_port(runtime: Runtime) -> Result<()> {
    leaves_nothing(runtime, || {
        let running = Running::start(runtime, &["--publish=127.0.0.1::80"], SERVER)?;
        let published = ok(&["port", &running.0, "80/tcp"])?;
        until_true("the page is served", PATIENCE, || {
            Ok(page(&published).is_ok_and(|page| page == "page"))
        })?;
        // By its address, from the host and from another container of the bridge.
        let address = running.inspect("{{.NetworkSettings.IPAddress}}")?;
        ensure!(running.shell("ip -o -4 addr show eth0")?.contains(&format!(" {address}/")));
        ensure!(page(&format!("{address}:80"))? == "page");
        let other = once(runtime, &[], &format!("wget -q -O - http://{address}/index.html"))?;
        ensure!(other.text(0)? == "page");
        Ok(())
    })
}

/// `docker network connect` and `disconnect` while it runs.
fn networks(runtime: Runtime) -> Result<()> {
    leaves_nothing(runtime, || {
        let network = Network::create(&["--subnet=10.99.7.0/24"])?;
        let running = Running::start(runtime, &[], SERVER)?;
        let at = |wanted: &str| {
            let wanted = wanted.to_owned();
            until_true(&wanted.clone(), PATIENCE, || {
                Ok(running.shell("ip -o -4 addr | awk '{ printf \"%s \", $2 }'")?.trim() == wanted)
            })
        };
        at("lo eth0")?;
        ok(&["network", "connect", "--ip=10.99.7.9", &network.0, &running.0])?;
        at("lo eth0 eth1")?;
        ensure!(page("10.99.7.9:80")? == "page");
        ensure!(running.shell("ip route")?.contains("10.99.7.0/24 dev eth1"));
        // Its name server is Docker's from then on, and knows it by its name.
        let name = running.0.clone();
        ensure!(running.shell(&format!("wget -q -O - http://{name}/index.html"))? == "page");
        ok(&["network", "disconnect", &network.0, &running.0])?;
        at("lo eth0")?;
        ok(&["network", "connect", &network.0, &running.0])?;
        until_true("there are two again", PATIENCE, || {
            Ok(running.shell("ip -o -4 addr | grep -c ' eth'")? == "2")
        })
    })
}

/// Names of containers in a network of the user's, as Docker's own name server has them.
fn names(runtime: Runtime) -> Result<()> {
    leaves_nothing(runtime, || {
        let network = Network::create(&["--internal"])?;
        let of = format!("--network={}", network.0);
        let server = Running::start(runtime, &[&of, "--network-alias=aliased"], SERVER)?;
        let resolver = once(runtime, &[&of], "grep nameserver /etc/resolv.conf")?.text(0)?;
        ensure!(resolver == "nameserver 127.0.0.11", "{resolver}");
        for name in [&server.0, "aliased"] {
            let line = format!("wget -q -O - http://{name}/index.html");
            ensure!(once(runtime, &[&of], &line)?.text(0)? == "page", "{name}");
        }
        // Many at once, from one that serves names itself: the port is its own.
        let line = "nc -lu -p 53 & for i in 1 2 3 4 5 6 7 8; do nslookup -type=a aliased. >/tmp/$i & done; \
            sleep 5; cat /tmp/? | grep -c 'Name:.*aliased'; \
            nslookup -type=a nobody. | grep -ci 'NXDOMAIN\\|SERVFAIL'";
        let said = once(runtime, &[&of], line)?.text(0)?;
        ensure!(said == "8\n1", "{said}");
        // By TCP: a header, a question, and its length before it.
        let line = "printf '\\0\\031\\1\\2\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7aliased\\0\\0\\1\\0\\1' | \
            nc -w 5 127.0.0.11 53 | od -An -tx1 -N 4 -j 2 | tr -d ' '";
        let said = once(runtime, &[&of], line)?.text(0)?;
        ensure!(said.starts_with("01028"), "{said}");
        Ok(())
    })
}

fn no_network(runtime: Runtime) -> Result<()> {
    let said = once(runtime, &["--network=none"], "ip -o link | awk '{ print $2 }'")?.text(0)?;
    ensure!(said == "lo:", "{said}");
    Ok(())
}

/// Refused by name, with the reason.
fn devices_of_the_host(runtime: Runtime) -> Result<()> {
    let refused = once(runtime, &["--device=/dev/kvm"], "true")?;
    ensure!(refused.code == 125 && refused.stderr.contains("/dev/kvm is a device"), "{refused:?}");
    Ok(())
}

/// Another runtime of `daemon.json`, whose options name settings.
fn flavours(_: Runtime) -> Result<()> {
    let fixed = ["run", "--rm", "--runtime=husk-large", "busybox"];
    let line = "awk '/MemTotal/ { print $2 }' /proc/meminfo";
    let kib: u64 = ok(&[&fixed[..], &["sh", "-c", line]].concat())?.parse()?;
    ensure!(kib > 400 << 10, "{kib} KiB");
    Ok(())
}

/// Refused, with the reason; nothing is left, and the host's interfaces are as they were.
fn hosts_network(runtime: Runtime) -> Result<()> {
    // Docker keeps a name of the host's namespace from then on.
    once(runtime, &["--network=host"], "true")?;
    leaves_nothing(runtime, || {
        let refused = once(runtime, &["--network=host"], "true")?;
        ensure!(
            refused.code == 125 && refused.stderr.contains("network of its own"),
            "{refused:?}"
        );
        let other = Running::start(runtime, &[], "sleep 1000")?;
        let of = format!("--network=container:{}", other.0);
        let refused = once(runtime, &[&of], "true")?;
        ensure!(refused.code == 125, "{refused:?}");
        Ok(())
    })
}
