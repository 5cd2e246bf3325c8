//! What passes through the network: both families, datagrams, large packets, names.

use std::io::Write;
use std::net::UdpSocket;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{DEBIAN, Run, Runtime};
use husk_tests::network::Network;
use husk_tests::task::Task;
use husk_tests::wait::PATIENCE;

use crate::Case;
use crate::laid::{BRIDGED, ON_A_BRIDGE, ON_TWO_BRIDGES, TWO};
use crate::network::{bridge_plugin, bridged, inside, ping, pings, same_as_laid, subnet};

pub const CASES: &[Case] = &[
    ("traffic::both_families_between_containers", both_families),
    ("traffic::datagrams", datagrams),
    ("traffic::mtu_1280", |runtime| mtu_of(runtime, ON_TWO_BRIDGES[0])),
    ("traffic::mtu_1500", mtu_1500),
    ("traffic::mtu_9000", |runtime| mtu_of(runtime, ON_TWO_BRIDGES[1])),
    ("traffic::names", names),
];

fn subnet_v6(case: u8, runtime: Runtime) -> String {
    format!("fd00:{}:{case}:", runtime as u8 + 1)
}

fn both_families(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    let client = &shared.client;
    let (v4, v6) = (subnet(ON_A_BRIDGE, runtime), subnet_v6(ON_A_BRIDGE, runtime));
    for to in [format!("{v4}.2"), format!("{v6}:2")] {
        ping(client, "-s 60000", &to)?;
        let line = format!(
            "for i in $(seq 10); do echo hello | nc -w 10 {to} 7 && exit; sleep 1; done; exit 1"
        );
        ensure!(client.shell(&line)? == "hello", "{to}");
    }
    Ok(())
}

/// Sends every datagram back; for both families.
const ECHO: &str = "use Socket qw(:DEFAULT inet_pton IN6ADDR_ANY pack_sockaddr_in6); socket(S, AF_INET6, SOCK_DGRAM, 0); \
    bind(S, pack_sockaddr_in6(7, IN6ADDR_ANY)) or die $!; $| = 1; print qq(ready\\n); \
    while (defined($from = recv(S, $data, 65536, 0))) { send(S, $data, 0, $from) }";

/// Sends datagrams of several lengths and wants each back.
const ASK: &str = "use Socket qw(:DEFAULT inet_pton IN6ADDR_ANY pack_sockaddr_in6); my ($to, $port) = @ARGV; my $six = $to =~ /:/; \
    socket(S, $six ? AF_INET6 : AF_INET, SOCK_DGRAM, 0); \
    my $address = inet_pton($six ? AF_INET6 : AF_INET, $to); \
    $to = $six ? pack_sockaddr_in6($port, $address) : pack_sockaddr_in($port, $address); \
    for $length (1, 1400, 60000) { my $data = 'x' x $length; send(S, $data, 0, $to) or die $!; \
    alarm 30; recv(S, $back, 65536, 0); die unless $back eq $data } print 'complete'";

/// Host to container, container to host, container to container; whole ones and fragmented ones.
fn datagrams(runtime: Runtime) -> Result<()> {
    let (network, _bridge) = bridged(18, runtime, 1500)?;
    let other = Network::new()?;
    other.lay("eth0", bridge_plugin(18, runtime, 1500))?;
    let server = Run::new(runtime, &["perl", "-e", ECHO]).image(DEBIAN);
    let _server = Task::start(inside(&network, server))?;
    let client = Run::new(runtime, &["sleep", "1000"]).image(DEBIAN);
    let client = Task::start(inside(&other, client))?;
    let (v4, v6) = (subnet(18, runtime), subnet_v6(18, runtime));
    for (to, any) in [(format!("{v4}.2"), "0.0.0.0:0"), (format!("{v6}:2"), "[::]:0")] {
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        socket.connect((to.as_str(), 7))?;
        for length in [1, 1400, 60000] {
            let data = vec![b'y'; length];
            let mut back = vec![0; 65536];
            let since = Instant::now();
            // The first ones may come before the server, and are lost then as datagrams are.
            let count = loop {
                let sent = socket.send(&data).and_then(|_| socket.recv(&mut back));
                match sent {
                    Ok(count) => break count,
                    Err(error) => {
                        ensure!(since.elapsed() < PATIENCE, "{to}: {error}");
                    }
                }
            };
            ensure!(back[..count] == data, "{to}: {count} of {length} bytes");
        }
        ask(&client, &to, 7)?;
    }
    for address in [format!("{v4}.1"), format!("{v6}:1")] {
        let host = Echo::start(&address)?;
        ask(&client, &address, host.port)?;
    }
    Ok(())
}

fn ask(client: &Task, to: &str, port: u16) -> Result<()> {
    let said = client.exec(&["perl", "-e", ASK, to, &port.to_string()])?.text(0)?;
    ensure!(said == "complete", "{to}: {said}");
    Ok(())
}

/// The host's own echo of datagrams, for as long as this lives.
struct Echo {
    port: u16,
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(address: &str) -> Result<Self> {
        let socket = UdpSocket::bind((address, 0)).with_context(|| address.to_owned())?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let port = socket.local_addr()?.port();
        let ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let mut data = vec![0; 65536];
            while !told.load(Ordering::Relaxed) {
                if let Ok((count, from)) = socket.recv_from(&mut data) {
                    let _ = socket.send_to(&data[..count], from);
                }
            }
        });
        Ok(Self { port, ended, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Packets of every length that the MTU makes of 60,000 bytes.
fn mtu(runtime: Runtime, task: &Task, case: u8, mtu: u32) -> Result<()> {
    let to = [format!("{}.1", subnet(case, runtime)), format!("{}:1", subnet_v6(case, runtime))];
    // The largest that pass whole.
    let whole = [28, 48].map(|header| format!("-s {}", mtu - header));
    let many = "-s 60000";
    pings(task, &[(many, &to[0]), (&whole[0], &to[0]), (many, &to[1]), (&whole[1], &to[1])])
}

fn mtu_1500(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    same_as_laid(&shared.network, &shared.task, "eth0")?;
    mtu(runtime, &shared.task, ON_A_BRIDGE, 1500)
}

fn mtu_of(runtime: Runtime, (interface, case, wanted): (&str, u8, u32)) -> Result<()> {
    let shared = TWO.of(runtime)?;
    same_as_laid(&shared.network, &shared.task, interface)?;
    mtu(runtime, &shared.task, case, wanted)
}

/// A name server on the bridge, ended with the case.
struct Resolver(Child);

impl Resolver {
    fn start(address: &str) -> Result<Self> {
        let host = format!("--host-record=service.husk.test,{address},fd00::53");
        let child = Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
            .args(["--bind-interfaces", "--pid-file=", "--user=root", "--except-interface=lo"])
            .arg(format!("--listen-address={address}"))
            .args([&host, "--txt-record=text.husk.test,long"])
            .spawn()
            .context("dnsmasq")?;
        Ok(Self(child))
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Names are looked up where the engine's resolv.conf says, also once it says otherwise.
fn names(runtime: Runtime) -> Result<()> {
    let (network, _bridge) = bridged(22, runtime, 1500)?;
    let gateway = format!("{}.1", subnet(22, runtime));
    let mut settings = tempfile::NamedTempFile::new()?;
    writeln!(settings, "nameserver {gateway}\nsearch husk.test\noptions timeout:10")?;
    let _resolver = Resolver::start(&gateway)?;
    let mount = format!(
        "type=bind,src={},dst=/etc/resolv.conf,options=rbind:rw",
        settings.path().display()
    );
    let run = Run::new(runtime, &["sleep", "1000"]).image(DEBIAN).flag("--mount").flag(mount);
    let task = Task::start(inside(&network, run))?;
    for name in ["service.husk.test", "service"] {
        let found = task.shell(&format!("getent ahosts {name}"))?;
        ensure!(found.contains(&gateway) && found.contains("fd00::53"), "{name}: {found}");
    }
    let missing = task.exec(&["getent", "ahosts", "nobody.husk.test"])?;
    ensure!(missing.code == 2, "{missing:?}");
    // As engines do it: the same file, other lines.
    settings.as_file().set_len(0)?;
    std::fs::write(settings.path(), format!("nameserver {gateway}\nsearch other.test\n"))?;
    let line = "for i in $(seq 50); do grep -q other.test /etc/resolv.conf && break; sleep 0.2; done; \
                cat /etc/resolv.conf; getent ahosts service >/dev/null || echo gone; \
                getent ahostsv4 service.husk.test | head -n 1";
    let seen = task.shell(line)?;
    ensure!(seen.contains("search other.test\ngone\n"), "{seen}");
    ensure!(seen.lines().last().is_some_and(|line| line.starts_with(&gateway)), "{seen}");
    Ok(())
}
