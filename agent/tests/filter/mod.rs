//! Packet filter rules, as the runtime lists them in one namespace and the agent makes them in another.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Result, ensure};
use husk_agent_protocols::agent::{NetworkState, NftablesTable, UpdateNetworkResponse};
use husk_runtime::resource::network::{Filter, Found, Namespace};

use crate::harness::{Agent, skip};

/// As the CNI plugin of a mesh lays them in a pod: all but the proxy's own connections go through the proxy.
const REDIRECTS: &str = "
*nat
:MESH_IN - [0:0]
:MESH_OUT - [0:0]
:TO_PROXY - [0:0]
-A PREROUTING -p tcp -j MESH_IN
-A OUTPUT -p tcp -j MESH_OUT
-A MESH_IN -p tcp --dport 15008 -j RETURN
-A MESH_IN -p tcp -m multiport --dports 4190,4191 -j RETURN
-A MESH_IN -p tcp -m comment --comment \"to the proxy\" -j REDIRECT --to-ports 15006
-A TO_PROXY -p tcp -j REDIRECT --to-ports 15001
-A MESH_OUT -s 127.0.0.6/32 -o lo -j RETURN
-A MESH_OUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 53 -m owner --uid-owner 1337 -j TO_PROXY
-A MESH_OUT -o lo -p tcp -m tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN
-A MESH_OUT -m owner --uid-owner 1337 -j RETURN
-A MESH_OUT -m owner --gid-owner 1337 -j RETURN
-A MESH_OUT -d 127.0.0.1/32 -j RETURN
-A MESH_OUT -j TO_PROXY
COMMIT
*mangle
:MESH_MARK - [0:0]
-A PREROUTING -p tcp -m mark --mark 0x539 -j CONNMARK --save-mark
-A PREROUTING -p tcp -m socket --transparent -j MESH_MARK
-A MESH_MARK -j MARK --set-xmark 0x539/0xffffffff
-A PREROUTING ! -d 127.0.0.1/32 -i lo -p tcp -j TPROXY --on-port 15006 --on-ip 0.0.0.0 --tproxy-mark 0x539/0xffffffff
-A OUTPUT -p tcp -m connmark --mark 0x539 -j CONNMARK --restore-mark
COMMIT
*raw
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1
COMMIT
*filter
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A OUTPUT -p tcp -m tcp --dport 81 -j REJECT --reject-with tcp-reset
COMMIT
";

/// What programs that write nftables themselves may lay: sets, maps, counters, chains without a name.
const NFTABLES: &str = "
table inet mesh {
    comment \"a mesh's\"
    counter seen { packets 7 bytes 8 }
    quota much { over 10 mbytes used 3 mbytes }
    set ports { type inet_service; flags interval; elements = { 80, 443, 8000-8999 } }
    set clients { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 1-9 } }
    set recent { type ipv4_addr; flags dynamic,timeout; timeout 1m; size 100; elements = { 10.1.2.3 } }
    map where { type inet_service : verdict; elements = { 1 : drop, 2 : jump proxied } }
    chain proxied { tcp dport @ports counter packets 5 bytes 6 redirect to :15001; }
    chain out {
        type nat hook output priority -100; policy accept;
        meta skuid 1337 return comment \"the proxy itself\"
        oifname lo return
        oif lo ip daddr != 127.0.0.0/8 accept
        tcp dport vmap @where
        tcp dport { 22, 25-30, 53 } return
        ip daddr . tcp dport @clients counter name seen accept
        meta l4proto tcp jump { ip daddr 10.9.9.9 accept; ip6 daddr ::1 accept; }
        jump proxied
    }
    chain in {
        type filter hook input priority 0; policy accept;
        ct state new update @recent { ip saddr limit rate 10/second }
        tcp dport 81 reject with tcp reset
        quota name much drop
        fib saddr oif missing drop
    }
}
table ip6 other {
    chain forward { type filter hook forward priority 10; policy drop; }
}
";

/// A network namespace that lives as long as this.
struct Other(Child);

impl Other {
    fn new() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo; exec sleep 1000"]).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut line = [0];
        if let Some(output) = &mut child.stdout {
            std::io::Read::read_exact(output, &mut line)?;
        }
        Ok(Self(child))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program in a namespace with `input`; an error says what it said.
fn within(namespace: &Path, words: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).args(words);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut to) = child.stdin.take() {
        // One that does not read is told by its status.
        let _ = to.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{words:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn filter(namespace: &Path) -> Result<Filter> {
    let namespace = Namespace::open(namespace)?;
    let found = Found::scan(&namespace).await?;
    Ok(namespace.filter(&found.names(), &[])?)
}

/// Tells the agent what a namespace has.
async fn tell(agent: &Agent, namespace: &Path) -> Result<(Filter, UpdateNetworkResponse)> {
    let filter = filter(namespace).await?;
    let mut state = NetworkState::new();
    state.nftables.clone_from(&filter.nftables);
    state.xtables.clone_from(&filter.xtables);
    let answer = agent.update_network(&state).await?;
    Ok((filter, answer))
}

/// Lays rules, has the agent make the same, and compares.
async fn carried(agent: &Agent, program: &str, rules: &str) -> Result<bool> {
    let other = Other::new()?;
    let path = other.path();
    let words: Vec<_> = program.split(' ').collect();
    if let Err(error) = within(&path, &words, rules) {
        husk_skip::skipped(error);
        return Ok(false);
    }
    let (laid, answer) = tell(agent, &path).await?;
    assert_eq!(laid.refused(&answer.filter_refused), [], "{program}");
    assert_eq!(laid.uncarried, [], "{program}");
    assert!(answer.refused.is_empty(), "{answer:?}");
    let made = filter(&agent.network()?).await?;
    assert_eq!(laid.nftables.len(), made.nftables.len(), "{program}");
    for (laid, made) in laid.nftables.iter().zip(&made.nftables) {
        let kinds = |table: &NftablesTable| -> Vec<_> {
            table.messages.iter().map(|message| message.kind).collect()
        };
        assert_eq!(kinds(laid), kinds(made), "{program}");
        for (laid, made) in laid.messages.iter().zip(&made.messages) {
            assert_eq!(laid, made, "{program}");
        }
    }
    // The bytes of these say nothing to a reader.
    assert!(laid.xtables == made.xtables, "{program}");
    assert!(!laid.nftables.is_empty() || !laid.xtables.is_empty(), "{program}");
    Ok(true)
}

/// Has the agent remove everything.
async fn clear(agent: &Agent) -> Result<()> {
    let answer = agent.update_network(&NetworkState::new()).await?;
    assert!(answer.refused.is_empty() && answer.filter_refused.is_empty(), "{answer:?}");
    Ok(())
}

fn with_agent<F: Future<Output = Result<()>>>(test: impl FnOnce(Agent) -> F) -> Result<()> {
    if skip() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { test(Agent::start().await?).await })
}

#[test]
fn tables_are_the_same_in_the_guest() -> Result<()> {
    with_agent(|agent| async move {
        for (program, rules) in [("iptables-nft-restore", REDIRECTS), ("nft -f -", NFTABLES)] {
            carried(&agent, program, rules).await?;
            clear(&agent).await?;
            assert!(filter(&agent.network()?).await?.nftables.is_empty(), "{program}");
        }
        carried(&agent, "iptables-legacy-restore", REDIRECTS).await?;
        agent.end().await
    })
}
