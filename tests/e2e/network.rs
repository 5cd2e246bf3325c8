//! The network that plugins and hooks lay is the container's, whatever kernel it is under.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::client;
use husk_tests::containerd::{Run, Runtime, finish, spawn};
use husk_tests::network::{Network, ip, run};
use husk_tests::task::Task;
use husk_tests::wait::{CLEAN_UP, PATIENCE, until_true};
use serde_json::{Value, json};

use crate::Case;
use crate::laid::{BRIDGED, ON_A_BRIDGE, ON_TWO_BRIDGES, OVER_PARENTS, SIBLINGS, TWO, port};

pub const CASES: &[Case] = &[
    ("network::bridge", bridge),
    ("network::stream", stream),
    ("network::published_port", published_port),
    ("network::between_containers", between_containers),
    ("network::ptp_with_small_packets", ptp),
    ("network::macvlan_with_large_packets", macvlan),
    ("network::ipvlan", ipvlan),
    ("network::two_interfaces", two_interfaces),
    ("network::behind_translation", behind_translation),
    ("network::laid_by_a_hook", laid_by_a_hook),
    ("network::laid_before_start", laid_before_start),
    ("network::changed_while_running", changed_while_running),
    ("network::none", none),
    ("network::packet_filter", packet_filter),
];

pub const HUSK_CASES: &[Case] = &[
    ("network::not_the_hosts", not_the_hosts),
    ("network::namespace_left_as_it_was", namespace_left_as_it_was),
];

/// One subnet for each case and runtime: they run side by side.
pub fn subnet(case: u8, runtime: Runtime) -> String {
    format!("10.{}.{case}", if runtime == Runtime::Runc { 201 } else { 202 })
}

pub fn bridge_name(case: u8, runtime: Runtime) -> String {
    format!("{}br{case}", runtime.name())
}

pub fn bridge_plugin(case: u8, runtime: Runtime, mtu: u32) -> Value {
    let net = subnet(case, runtime);
    json!({"type": "bridge", "bridge": bridge_name(case, runtime), "isGateway": true,
        "ipMasq": true, "mtu": mtu, "name": bridge_name(case, runtime),
        "ipam": {"type": "host-local", "dataDir": addresses(&bridge_name(case, runtime)),
            "ranges": [[{"subnet": format!("{net}.0/24")}],
                [{"subnet": format!("fd00:{}:{case}::/64", runtime as u8 + 1)}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}})
}

/// The folder in which the addresses given out on a bridge are kept.
fn addresses(bridge: &str) -> String {
    format!("/run/ipam-{bridge}")
}

/// A bridge for a case, gone with it.
pub struct Bridge(pub String);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.0]);
        // A row that is tried again expects the first addresses again.
        let _ = std::fs::remove_dir_all(addresses(&self.0));
    }
}

pub fn bridged(case: u8, runtime: Runtime, mtu: u32) -> Result<(Network, Bridge)> {
    let bridge = Bridge(bridge_name(case, runtime));
    let network = Network::new()?;
    network.lay("eth0", bridge_plugin(case, runtime, mtu))?;
    Ok((network, bridge))
}

pub fn inside(network: &Network, run: Run) -> Run {
    run.flag("--with-ns").flag(network.flag())
}

/// What the container sees is what was laid: compared with the namespace's own listing.
pub fn same_as_laid(network: &Network, task: &Task, interface: &str) -> Result<()> {
    let laid: Value = serde_json::from_str(&network.ip(&["-j", "addr", "show", interface])?)?;
    // In one process: each takes a second or two.
    let look = format!(
        "cat /sys/class/net/{interface}/address /sys/class/net/{interface}/mtu; \
         ip addr show {interface}; \
         for family in -4 -6; do echo ----; ip $family route show dev {interface}; done"
    );
    let all = task.shell(&look)?;
    let mut parts = all.split("----");
    let seen = parts.next().context("nothing")?;
    let mut lines = seen.lines();
    ensure!(lines.next() == laid[0]["address"].as_str(), "{seen}\n{laid}");
    let mtu = lines.next().and_then(|line| line.parse::<u64>().ok());
    ensure!(mtu == laid[0]["mtu"].as_u64(), "{seen}\n{laid}");
    let addresses = laid[0]["addr_info"].as_array().context("no addresses")?;
    for address in addresses {
        let text = format!("{}/{} ", address["local"].as_str().unwrap_or(""), address["prefixlen"]);
        ensure!(seen.contains(&text), "{text} is not in {seen}");
    }
    let count = seen.lines().filter(|line| line.trim_start().starts_with("inet")).count();
    ensure!(count == addresses.len(), "{seen}\n{laid}");
    // Written differently, so counted: all but what each kernel makes for itself.
    for family in ["-4", "-6"] {
        let laid = network.ip(&[family, "route", "show", "dev", interface])?;
        let seen = parts.next().with_context(|| format!("no routes {family} in {all}"))?;
        let own = |line: &&str| !line.is_empty() && !line.starts_with("multicast");
        let (laid, seen) = (laid.lines().filter(own), seen.lines().filter(own));
        ensure!(
            laid.clone().count() == seen.clone().count(),
            "{all}\n{:?}",
            laid.collect::<Vec<_>>()
        );
    }
    Ok(())
}

pub fn sleeping(network: &Network, runtime: Runtime) -> Result<Task> {
    Task::start(inside(network, Run::new(runtime, &["sleep", "1000"])))
}

pub fn ping(task: &Task, flags: &str, to: &str) -> Result<()> {
    pings(task, &[(flags, to)])
}

/// Several, one after the other, by one process.
pub fn pings(task: &Task, wanted: &[(&str, &str)]) -> Result<()> {
    let line = |(flags, to): &(&str, &str)| format!("ping -c 2 -w 20 {flags} {to}");
    task.shell(&wanted.iter().map(line).collect::<Vec<_>>().join(" && ")).map(drop)
}

fn bridge(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    let task = &shared.task;
    same_as_laid(&shared.network, task, "eth0")?;
    let gateway = format!("{}.1", subnet(ON_A_BRIDGE, runtime));
    let sixth = format!("fd00:{}:{ON_A_BRIDGE}::1", runtime as u8 + 1);
    pings(task, &[("", &gateway), ("-s 60000", &gateway), ("-6", &sixth)])?;
    // And from the host.
    let own = format!("{}.2", subnet(ON_A_BRIDGE, runtime));
    run("busybox", &["ping", "-c", "2", "-w", "20", &own]).map(drop)
}

/// 32 MiB each way at once, complete.
fn stream(runtime: Runtime) -> Result<()> {
    const LENGTH: usize = 4 << 20;
    let shared = BRIDGED.of(runtime)?;
    let listener = TcpListener::bind(format!("{}.1:0", subnet(ON_A_BRIDGE, runtime)))?;
    let address = listener.local_addr()?;
    let line = format!(
        "head -c {LENGTH} /dev/zero | tr '\\0' a | nc {} {} | md5sum",
        address.ip(),
        address.port()
    );
    let words = ["task", "exec", "--exec-id", "stream", &shared.task.id, "sh", "-c", &line];
    let child = spawn(&words)?;
    let (mut peer, _) = listener.accept()?;
    let mut sender = peer.try_clone()?;
    let sending = std::thread::spawn(move || sender.write_all(&vec![b'b'; LENGTH]));
    let mut received = Vec::with_capacity(LENGTH);
    peer.read_to_end(&mut received)?;
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    // Not before: nc ends with its input from the network, whatever it still has to send.
    peer.shutdown(Shutdown::Write)?;
    ensure!(received.len() == LENGTH && received.iter().all(|byte| *byte == b'a'));
    let mut expected = tempfile::NamedTempFile::new()?;
    expected.write_all(&vec![b'b'; LENGTH])?;
    let path = expected.path().to_string_lossy().into_owned();
    let sum = run("md5sum", &[&path])?;
    let seen = finish(child)?.text(0)?;
    ensure!(seen.split(' ').next() == sum.split(' ').next(), "{seen} instead of {sum}");
    Ok(())
}

pub fn echo(address: &str, text: &str) -> Result<String> {
    let since = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) => ensure!(since.elapsed() < PATIENCE, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = String::new();
    stream.read_to_string(&mut back)?;
    Ok(back)
}

/// From another namespace, as from another machine, to a port of the host's.
fn published_port(runtime: Runtime) -> Result<()> {
    let _shared = BRIDGED.of(runtime)?;
    let port = port(runtime);
    // By the bridge's address, from this host; then over another link, from outside.
    let gateway = format!("{}.1:{port}", subnet(ON_A_BRIDGE, runtime));
    ensure!(echo(&gateway, "published")? == "published");
    let (outside, _near, far) = outside(runtime, "pub", 93)?;
    outside.ip(&["route", "add", "default", "via", &format!("{far}.1")])?;
    let line = format!("echo outside | busybox nc -w 20 {far}.1 {port}");
    let said = run("ip", &["netns", "exec", &outside.name, "sh", "-c", &line])?;
    ensure!(said == "outside\n", "{said}");
    Ok(())
}

/// Another machine, as far as the host can tell: its namespace, the link to it, and the subnet
/// whose first address is the host's and whose second is the other's.
fn outside(runtime: Runtime, name: &str, third: u8) -> Result<(Network, Bridge, String)> {
    let outside = Network::new()?;
    let far = format!("192.168.{}", third + runtime as u8);
    let near = format!("{}{name}", runtime.name());
    ip(&["link", "add", &near, "type", "veth", "peer", "name", "far0", "netns", &outside.name])?;
    let bridge = Bridge(near.clone());
    ip(&["addr", "add", &format!("{far}.1/24"), "dev", &near])?;
    ip(&["link", "set", &near, "up"])?;
    outside.ip(&["addr", "add", &format!("{far}.2/24"), "dev", "far0"])?;
    outside.ip(&["link", "set", "far0", "up"])?;
    Ok((outside, bridge, far))
}

fn between_containers(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    let to = format!("{}.2", subnet(ON_A_BRIDGE, runtime));
    ping(&shared.client, "", &to)?;
    let line = format!(
        "for i in 1 2 3 4 5; do echo hello | nc -w 10 {to} 7 && exit; sleep 1; done; exit 1"
    );
    ensure!(shared.client.shell(&line)? == "hello");
    Ok(())
}

fn ptp(runtime: Runtime) -> Result<()> {
    let net = subnet(5, runtime);
    let network = Network::new()?;
    let plugin = json!({"type": "ptp", "mtu": 1280, "ipMasq": false, "ipam": {
        "type": "host-local", "dataDir": format!("/run/ipam-{net}"),
        "subnet": format!("{net}.0/24"), "routes": [{"dst": "0.0.0.0/0"}]}});
    network.lay("eth0", plugin)?;
    let task = sleeping(&network, runtime)?;
    same_as_laid(&network, &task, "eth0")?;
    ping(&task, "", &format!("{net}.1"))?;
    ping(&task, "-s 60000", &format!("{net}.1"))
}

fn siblings(runtime: Runtime, (interface, case): (&str, u8)) -> Result<()> {
    let (shared, net) = (SIBLINGS.of(runtime)?, subnet(case, runtime));
    let [first, second] = &shared.tasks;
    same_as_laid(&shared.networks[0], first, interface)?;
    ping(second, "", &format!("{net}.2"))?;
    ping(first, "-s 30000", &format!("{net}.3"))
}

fn macvlan(runtime: Runtime) -> Result<()> {
    siblings(runtime, OVER_PARENTS[0])
}

fn ipvlan(runtime: Runtime) -> Result<()> {
    siblings(runtime, OVER_PARENTS[1])
}

fn two_interfaces(runtime: Runtime) -> Result<()> {
    let shared = TWO.of(runtime)?;
    for (interface, case, _) in ON_TWO_BRIDGES {
        same_as_laid(&shared.network, &shared.task, interface)?;
        ping(&shared.task, "", &format!("{}.1", subnet(case, runtime)))?;
    }
    let way = shared.task.shell("ip route get 192.168.77.5 | head -n 1")?;
    ensure!(way.contains("dev net1"), "{way}");
    Ok(())
}

/// An address that only the host can reach, behind its network address translation.
fn behind_translation(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    let (_outside, _near, far) = outside(runtime, "out", 90)?;
    ping(&shared.task, "", &format!("{far}.2"))
}

/// As nerdctl does it: a hook on the host finds the namespace by the pid it is told.
fn laid_by_a_hook(runtime: Runtime) -> Result<()> {
    let net = subnet(11, runtime);
    let host = format!("{}hook", runtime.name());
    let line = format!(
        "set -e; pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); \
         ip link add {host} type veth peer name eth0 netns /proc/$pid/ns/net; \
         ip addr add {net}.1/24 dev {host}; ip link set {host} up; \
         nsenter -t $pid -n ip addr add {net}.2/24 dev eth0; \
         nsenter -t $pid -n ip link set eth0 up; \
         nsenter -t $pid -n ip route add default via {net}.1"
    );
    let run = Run::spec(runtime, &format!("ip route; ping -c 2 -w 20 {net}.1"), |spec| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", line],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
        spec["hooks"] = json!({"createRuntime": [hook]});
        spec["process"]["capabilities"]["effective"] = json!(["CAP_NET_RAW"]);
        spec["process"]["capabilities"]["permitted"] = json!(["CAP_NET_RAW"]);
        spec["process"]["capabilities"]["bounding"] = json!(["CAP_NET_RAW"]);
    })?;
    let seen = run.finish()?.text(0)?;
    ensure!(seen.contains(&format!("default via {net}.1 dev eth0")), "{seen}");
    // The namespace went with the container, and its interface with it.
    let since = Instant::now();
    while std::path::Path::new(&format!("/sys/class/net/{host}")).exists() {
        ensure!(since.elapsed() < Duration::from_secs(20), "{host} is left");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// As Docker and `ctr run --cni` do it: between Create and Start.
fn laid_before_start(runtime: Runtime) -> Result<()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    // There is one folder of networks.
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = std::path::Path::new("/etc/cni/net.d");
    let bridge = Bridge(bridge_name(12, runtime));
    let list = json!({"cniVersion": "0.4.0", "name": bridge.0,
        "plugins": [bridge_plugin(12, runtime, 1500)]});
    std::fs::create_dir_all(folder)?;
    std::fs::create_dir_all("/opt/cni")?;
    if !std::path::Path::new("/opt/cni/bin").exists() {
        std::os::unix::fs::symlink("/usr/lib/cni", "/opt/cni/bin")?;
    }
    let file = folder.join("00-test.conflist");
    std::fs::write(&file, list.to_string())?;
    let line = format!("ip addr show eth0; ping -c 2 -w 20 {}.1", subnet(12, runtime));
    let finished = Run::shell(runtime, &line).flag("--cni").finish();
    std::fs::remove_file(&file)?;
    let seen = finished?.text(0)?;
    ensure!(seen.contains(&format!("inet {}.2/24", subnet(12, runtime))), "{seen}");
    Ok(())
}

fn eventually(task: &Task, line: &str) -> Result<String> {
    let line = format!("for i in $(seq 100); do {line} && exit; sleep 0.2; done; ip addr; exit 1");
    task.shell(&line)
}

/// As `nerdctl network connect` and `disconnect` do it.
fn changed_while_running(runtime: Runtime) -> Result<()> {
    let shared = BRIDGED.of(runtime)?;
    let (network, task) = (&shared.network, &shared.task);
    let _second = Bridge(bridge_name(14, runtime));
    let mut plugin = bridge_plugin(14, runtime, 1500);
    plugin["ipam"]["routes"] = json!([]);
    network.lay("eth1", plugin)?;
    eventually(task, "ip addr show eth1 | grep -q 'inet 10'")?;
    ping(task, "", &format!("{}.1", subnet(14, runtime)))?;
    // An address more, another MTU, then all of it gone again.
    network.ip(&["addr", "add", "10.203.1.1/32", "dev", "eth1"])?;
    network.ip(&["link", "set", "eth1", "mtu", "1300"])?;
    eventually(task, "ip addr show eth1 | grep -q 10.203.1.1/32")?;
    eventually(task, "grep -q 1300 /sys/class/net/eth1/mtu")?;
    // The last address lost: the interface stays, and takes the next.
    network.ip(&["addr", "flush", "dev", "eth1"])?;
    eventually(task, "! ip addr show eth1 | grep -q inet")?;
    ensure!(task.shell("cat /sys/class/net/eth1/mtu")? == "1300");
    let own = format!("{}.9/24", subnet(14, runtime));
    network.ip(&["addr", "add", &own, "dev", "eth1"])?;
    eventually(task, "ip addr show eth1 | grep -q 'inet 10'")?;
    ping(task, "", &format!("{}.1", subnet(14, runtime)))?;
    // And so it does when it is set down and up.
    network.ip(&["link", "set", "eth1", "down"])?;
    eventually(task, "! ip link show eth1 | grep -q ,UP")?;
    network.ip(&["link", "set", "eth1", "up"])?;
    eventually(task, "ip link show eth1 | grep -q ,UP")?;
    ping(task, "", &format!("{}.1", subnet(14, runtime)))?;
    network.ip(&["link", "del", "eth1"])?;
    eventually(task, "[ ! -e /sys/class/net/eth1 ]")?;
    ping(task, "", &format!("{}.1", subnet(ON_A_BRIDGE, runtime)))
}

fn none(runtime: Runtime) -> Result<()> {
    let network = Network::new()?;
    network.ip(&["link", "set", "lo", "up"])?;
    let task = sleeping(&network, runtime)?;
    let seen =
        task.shell("ls /sys/class/net; ip route; ping -c 1 -w 5 127.0.0.1 >/dev/null; echo $?")?;
    ensure!(seen == "lo\n0", "{seen}");
    Ok(())
}

/// With the host's own programs: the image has none.
fn packet_filter(runtime: Runtime) -> Result<()> {
    let (network, _bridge) = bridged(15, runtime, 1500)?;
    let gateway = format!("{}.1", subnet(15, runtime));
    let line = format!(
        "set -e; b='busybox'; $b ping -c 1 -w 20 {gateway} >/dev/null; \
         iptables-nft -A OUTPUT -p icmp -d {gateway} -j DROP; \
         if $b ping -c 1 -w 2 {gateway} >/dev/null; then exit 3; fi; \
         iptables-nft -D OUTPUT 1; $b ping -c 1 -w 20 {gateway} >/dev/null; \
         iptables-nft -t nat -A OUTPUT -p tcp --dport 1 -j REDIRECT --to-ports 2; \
         iptables-nft -t nat -S OUTPUT | tail -n 1"
    );
    let run = Run::new(runtime, &["sh", "-c", &line]).image(husk_tests::containerd::DEBIAN);
    let run = run.flag("--cap-add").flag("CAP_NET_ADMIN");
    let run = run.flag("--mount").flag("type=bind,src=/usr,dst=/usr,options=rbind:ro");
    let seen = inside(&network, run).finish()?.text(0)?;
    ensure!(seen.ends_with("-j REDIRECT --to-ports 2"), "{seen}");
    Ok(())
}

fn not_the_hosts(runtime: Runtime) -> Result<()> {
    let before = ip(&["-o", "link"])?;
    let finished = Run::new(runtime, &["true"]).flag("--net-host").finish()?;
    ensure!(finished.code == 1 && finished.stderr.contains("host's network"), "{finished:?}");
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]))?;
    let pid = client::task(&task.id)?.pid;
    let joined = Run::new(runtime, &["true"]).flag("--with-ns");
    let finished = joined.flag(format!("network:/proc/{pid}/ns/net")).finish()?;
    ensure!(finished.code == 1 && finished.stderr.contains("another container"), "{finished:?}");
    ensure!(ip(&["-o", "link"])?.lines().count() == before.lines().count());
    Ok(())
}

/// Whatever was killed.
fn namespace_left_as_it_was(runtime: Runtime) -> Result<()> {
    let (network, _bridge) = bridged(16, runtime, 1500)?;
    let listing = || network.ip(&["-o", "addr"]);
    let before = listing()?;
    for victim in ["containerd-shim-husk-v2 -namespace", "husk-vmm machine", ""] {
        let task = sleeping(&network, runtime)?;
        ensure!(!network.disciplines()?.is_empty(), "nothing was joined");
        if !victim.is_empty() {
            let pids = run("pgrep", &["-f", &format!("{victim}.*")])?;
            let ours = pids.lines().filter(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                    .is_ok_and(|text| text.contains(&task.id))
            });
            for pid in ours {
                run("kill", &["-9", pid])?;
            }
            // A task whose shim was killed is gone at once.
            until_true("the task has ended", PATIENCE, || {
                Ok(client::task_is(&task.id, "STOPPED") || client::is_gone(&task.id))
            })?;
        }
        drop(task);
        // What ends in order has gone when the call returns.
        let patience = if victim.is_empty() { Duration::ZERO } else { CLEAN_UP };
        let as_before = until_true("the namespace is as before", patience, || {
            Ok(network.disciplines()?.is_empty() && listing()? == before)
        });
        as_before
            .with_context(|| format!("{victim}: {:?} {:?}", network.disciplines(), listing()))?;
    }
    Ok(())
}
