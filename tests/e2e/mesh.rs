//! Packet filter rules that a service mesh lays in the namespace of a container.

use std::io::Write;
use std::net::TcpListener;

use anyhow::{Result, ensure};
use husk_tests::containerd::{Run, Runtime};
use husk_tests::network::{Network, run};
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until_true};

use crate::Case;
use crate::network::{bridged, echo, inside, subnet};

pub const CASES: &[Case] = &[("network::rules_of_a_mesh", rules_of_a_mesh)];

/// What the CNI plugin of a service mesh lays: TCP from the pod goes to its proxy, but for the proxy's own, and
/// so does TCP to the pod.
const REDIRECTS: &str = "*nat
:MESH_OUT - [0:0]
-A PREROUTING -p tcp -m comment --comment \"to the proxy\" -j REDIRECT --to-ports 15006
-A OUTPUT -p tcp -j MESH_OUT
-A MESH_OUT -o lo -j RETURN
-A MESH_OUT -m owner --uid-owner 1337 -j RETURN
-A MESH_OUT -p tcp -j REDIRECT --to-ports 15001
COMMIT
";

/// The proxy's listeners. What it dials itself, it dials as the user that the rules name.
const PROXY: &str = "nc -ll -p 15001 -e echo out & exec nc -ll -p 15006 -e echo in";

/// A mesh's plugin lays rules in the namespace before the container starts and while it runs: they are carried out
/// by whatever kernel the container is under.
fn rules_of_a_mesh(runtime: Runtime) -> Result<()> {
    let (network, _bridge) = bridged(23, runtime, 1500)?;
    let within = |words: &[&str]| run("ip", &[&["netns", "exec", &network.name], words].concat());
    // What is redirected goes to the loopback device.
    network.ip(&["link", "set", "lo", "up"])?;
    let mut rules = tempfile::NamedTempFile::new()?;
    rules.write_all(REDIRECTS.as_bytes())?;
    let file = rules.path().to_string_lossy().into_owned();
    let listener = TcpListener::bind(format!("{}.1:0", subnet(23, runtime)))?;
    let outside = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"nobody\n");
        }
    });
    // To a listener outside: as any user, as the proxy; and from outside.
    let own = format!("{}.2:80", subnet(23, runtime));
    let dial = format!("nc -w 20 {} {} </dev/null", outside.ip(), outside.port());
    let said =
        |task: &Task, user: &str| task.exec_with(&["--user", user], &["sh", "-c", &dial])?.text(0);
    for iptables in ["iptables-legacy", "iptables-nft"] {
        within(&[&format!("{iptables}-restore"), &file])?;
        let task = Task::start(inside(&network, Run::shell(runtime, PROXY)))?;
        ensure!(echo(&own, "")? == "in\n", "{iptables}");
        ensure!(said(&task, "0")? == "out", "{iptables}");
        ensure!(said(&task, "1337")? == "nobody", "{iptables}");
        within(&[iptables, "-w", "-t", "nat", "-F"])?;
        if iptables == "iptables-nft" {
            // The change is heard.
            until_true("no redirect any more", PATIENCE, || Ok(said(&task, "0")? == "nobody"))?;
        }
    }
    if runtime == Runtime::Husk {
        not_carried_out(&network, &within)?;
    }
    Ok(())
}

/// Rules that a microVM cannot have keep the container from starting, and are named.
fn not_carried_out(network: &Network, within: &dyn Fn(&[&str]) -> Result<String>) -> Result<()> {
    let refused = |name: &str| -> Result<()> {
        let finished = inside(network, Run::new(Runtime::Husk, &["true"])).finish()?;
        ensure!(finished.code == 1 && finished.stderr.contains(name), "{name}: {finished:?}");
        ensure!(finished.stderr.contains("network.ignore_rules"), "{finished:?}");
        Ok(())
    };
    // It names a control group of the host; the guest's kernel does not have it; packets pass by it.
    let rules = [
        ("-m cgroup --cgroup 1 -j DROP", "rule (drop) with handle"),
        ("-j IDLETIMER --timeout 600 --label mesh", "rule (IDLETIMER) with handle"),
    ];
    for (rule, name) in rules {
        let rule: Vec<_> = rule.split(' ').collect();
        within(&[&["iptables-nft", "-w", "-A", "OUTPUT"], &rule[..]].concat())?;
        refused(name)?;
        within(&["iptables-nft", "-w", "-F", "OUTPUT"])?;
    }
    within(&["tc", "qdisc", "add", "dev", "eth0", "clsact"])?;
    refused("ingress queueing discipline of interface eth0")?;
    within(&["tc", "qdisc", "del", "dev", "eth0", "clsact"])?;
    ensure!(network.disciplines()?.is_empty(), "{:?}", network.disciplines());
    Ok(())
}
