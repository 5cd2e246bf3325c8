//! Servers as people run them, in a container with a network, used from the host over it: each
//! answers everything, and no client sees an error.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime};
use husk_tests::network::{Network, run};
use husk_tests::task::Task;
use husk_tests::wait::until_true;

use crate::Case;
use crate::network::{Bridge, bridged, inside, subnet};

pub const CASES: &[Case] = &[
    ("programs::nginx", nginx),
    ("programs::redis", redis),
    ("programs::postgresql", postgresql),
    ("programs::apt_mirror", apt_mirror),
    ("programs::ssh", ssh),
];

const IMAGE: &str = "docker.io/library/network:latest";

/// A container with servers in it, and the network it is on.
struct Server {
    task: Task,
    address: String,
    gateway: String,
    _network: Network,
    _bridge: Bridge,
}

fn server(runtime: Runtime, case: u8, line: &str) -> Result<Server> {
    let (network, bridge) = bridged(case, runtime, 1500)?;
    let run = Run::new(runtime, &["bash", "-c", line]).image(IMAGE);
    let task = Task::start(inside(&network, run))?;
    let address = format!("{}.2", subnet(case, runtime));
    let gateway = format!("{}.1", subnet(case, runtime));
    Ok(Server { task, address, gateway, _network: network, _bridge: bridge })
}

impl Server {
    fn answers(&self, port: u16) -> Result<()> {
        until_true(&format!("port {port} answers"), Duration::from_secs(120), || {
            Ok(std::net::TcpStream::connect((self.address.as_str(), port)).is_ok())
        })
    }
}

/// Beside each other in the log: what either runtime's clients measured.
fn figure(name: &str, runtime: Runtime, text: &str) {
    println!("figure: {name} {}: {text}", runtime.name());
}

fn nginx(runtime: Runtime) -> Result<()> {
    let line = "head -c 16384 /dev/urandom > /var/www/html/file && exec nginx -g 'daemon off;'";
    let server = server(runtime, 31, line)?;
    server.answers(80)?;
    let url = format!("http://{}/file", server.address);
    let said = run("wrk", &["-t", "1", "-c", "8", "-d", "3s", "--timeout", "60s", &url])?;
    // A line of its own tells of errors, and another of answers that are none.
    ensure!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    let rate = said.lines().find(|line| line.starts_with("Requests/sec")).context("no rate")?;
    figure("nginx", runtime, rate);
    let rate = rate.rsplit(' ').next().and_then(|rate| rate.parse::<f64>().ok());
    ensure!(rate.is_some_and(|rate| rate > 0.0), "{said}");
    let sum = server.task.shell("md5sum < /var/www/html/file")?;
    let line = format!("busybox wget -q -O - {url} | md5sum");
    ensure!(run("sh", &["-c", &line])?.trim_end() == sum);
    Ok(())
}

fn redis(runtime: Runtime) -> Result<()> {
    let line = "exec redis-server --bind 0.0.0.0 --protected-mode no --save ''";
    let server = server(runtime, 32, line)?;
    server.answers(6379)?;
    let words =
        ["-h", &server.address, "-n", "500", "-c", "5", "-t", "set,get,lrange_100", "--csv"];
    let said = run("redis-benchmark", &words)?;
    ensure!(!said.contains("rror"), "{said}");
    for test in ["SET", "GET", "LRANGE_100"] {
        let line = said.lines().find(|line| line.starts_with(&format!("\"{test}")));
        figure("redis", runtime, line.with_context(|| format!("no {test} in {said}"))?);
    }
    let words = ["-h", &server.address, "strlen", "key:__rand_int__"];
    ensure!(run("redis-cli", &words)?.trim() == "3");
    Ok(())
}

fn postgresql(runtime: Runtime) -> Result<()> {
    let line = "exec setpriv --reuid postgres --regid postgres --clear-groups \
                /usr/lib/postgresql/bin/postgres -D /var/lib/postgresql/main \
                -c listen_addresses='*' -c unix_socket_directories=/tmp";
    let server = server(runtime, 33, line)?;
    let there = ["-h", &server.address, "-U", "postgres"];
    until_true("PostgreSQL answers", Duration::from_secs(180), || {
        Ok(run("psql", &[&there[..], &["-c", "select 1"]].concat()).is_ok())
    })?;
    run("pgbench", &[&there[..], &["-q", "-i", "-s", "1", "postgres"]].concat())?;
    let words = ["-c", "2", "-t", "25", "postgres"];
    let said = run("pgbench", &[&there[..], &words].concat())?;
    let complete = "number of transactions actually processed: 50/50";
    ensure!(said.contains(complete) && said.contains("failed transactions: 0 "), "{said}");
    figure("postgresql", runtime, said.lines().find(|line| line.contains("tps")).unwrap_or(""));
    let words = ["-t", "-A", "-c", "select count(*) from pgbench_history", "postgres"];
    ensure!(run("psql", &[&there[..], &words].concat())?.trim() == "50");
    Ok(())
}

/// A web server on the host; ended with the case.
struct Web(Child);

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A package and the index that names it, made here: nothing comes from outside.
fn mirror() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let line = "set -e; cd \"$0\"; mkdir -p tree/DEBIAN tree/usr/share/local; \
        head -c 3000000 /dev/urandom > tree/usr/share/local/file; \
        printf 'Package: husk-local\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: n <n@n.test>\\n\
Description: local\\n' > tree/DEBIAN/control; \
        dpkg-deb -Znone -b tree husk-local.deb >/dev/null; \
        { cat tree/DEBIAN/control; echo Filename: ./husk-local.deb; \
          echo Size: $(stat -c %s husk-local.deb); \
          echo SHA256: $(sha256sum < husk-local.deb | cut -d' ' -f1); } > Packages";
    run("sh", &["-c", line, &folder.path().display().to_string()])?;
    Ok(folder)
}

fn apt_mirror(runtime: Runtime) -> Result<()> {
    let server = server(runtime, 34, "exec sleep 10000")?;
    let folder = mirror()?;
    let address = format!("{}:8{}", server.gateway, 100 + runtime as u16);
    let _web = Web(Command::new("busybox")
        .args(["httpd", "-f", "-p", &address, "-h", &folder.path().display().to_string()])
        .stdin(Stdio::null())
        .spawn()
        .context("httpd")?);
    let line = format!(
        "set -e; echo 'deb [trusted=yes] http://{address} ./' > /etc/apt/sources.list; \
         rm -rf /etc/apt/sources.list.d/*; cd /tmp; \
         apt-get update -q 2>&1; apt-get install -y -q husk-local 2>&1; \
         md5sum < /usr/share/local/file"
    );
    let said = server.task.exec(&["bash", "-c", &line])?.text(0)?;
    ensure!(!said.contains("E:") && !said.contains("Err:"), "{said}");
    let file: PathBuf = folder.path().join("tree/usr/share/local/file");
    let sum = run("sh", &["-c", "md5sum < \"$0\"", &file.display().to_string()])?;
    ensure!(said.lines().last() == Some(sum.trim_end()), "{said}");
    Ok(())
}

fn ssh(runtime: Runtime) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let key = folder.path().join("key").display().to_string();
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &key])?;
    let public = std::fs::read_to_string(format!("{key}.pub"))?;
    let line = format!(
        "mkdir -p /run/sshd /root/.ssh; chmod 700 /root /root/.ssh; \
         echo '{}' > /root/.ssh/authorized_keys; exec /usr/sbin/sshd -D -e",
        public.trim()
    );
    let server = server(runtime, 35, &line)?;
    server.answers(22)?;
    let there = format!("root@{}", server.address);
    let known = format!("UserKnownHostsFile={key}.known");
    let words = ["-i", &key, "-o", "StrictHostKeyChecking=no", "-o", &known, "-o", "BatchMode=yes"];
    let words = [&words[..], &["-o", "LogLevel=ERROR", "-F", "none", &there]].concat();
    // Bytes through it in both directions, and the exit code.
    let line = format!(
        "head -c 1000000 /dev/urandom > {key}.data; ssh \"$@\" 'cat; exit 7' < {key}.data > {key}.back; \
         echo $?; cmp {key}.data {key}.back && echo same"
    );
    let said = run("sh", &[&["-c", &line, "sh"], &words[..]].concat())?;
    ensure!(said == "7\nsame\n", "{said}");
    // And with a terminal of its own.
    let said = run("ssh", &[&["-tt"], &words[..], &["tty; stty size"]].concat())?;
    ensure!(said.contains("/dev/pts/"), "{said}");
    Ok(())
}
