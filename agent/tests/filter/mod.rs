//! Packet filter rules, as the runtime lists them in one namespace and the agent makes them in another.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use husk_agent_protocols::agent::{NetworkState, UpdateNetworkResponse, XtablesTable};
use husk_runtime::resource::network::{Filter, Found, Namespace};

use proptest::strategy::{Strategy, ValueTree};

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

/// Rules as of programs that write nftables themselves: sets, maps, counters, chains without a name.
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

/// A chain without a name, which gets one.
const NAMELESS: &str = "
table ip t {
    chain c {
        type filter hook input priority 0; policy accept;
        meta l4proto tcp jump { ip daddr 10.9.9.9 accept; ip saddr 10.9.9.9 drop; }
    }
}
";

/// The older tables of IPv6 have entries of their own.
const SIXTH: &str = "
*nat
-A OUTPUT -p tcp -m owner ! --uid-owner 1337 -j REDIRECT --to-ports 15001
COMMIT
*filter
:INPUT DROP [0:0]
-A INPUT -s fd00::/8 -p tcp -m tcp --dport 80 -j ACCEPT
COMMIT
";

const RAW_RULE: &str =
    "-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1\n";

/// Rules of all kinds for any order, in two chains.
const TABLE: &str = "
table inet t {
    chain other { }
    map m {
        type ipv4_addr : verdict; flags interval;
        elements = { 10.0.0.0/8 : drop, 11.0.0.0-12.255.255.255 : accept, 13.0.0.0/8 : jump other }
    }
    set s {
        type inet_proto . inet_service . ipv4_addr;
        elements = { tcp . 80 . 1.2.3.4, udp . 53 . 8.8.8.8 }
    }
    set d { type ipv4_addr; size 99; flags dynamic; counter; }
    counter n { }
    limit l { rate 9/second }
    quota q { until 9 bytes }
    ct timeout t { protocol tcp; l3proto ip; policy = { established: 9 }; }
    map o { type inet_service : counter; elements = { 1 : \"n\" } }
}
add chain inet t c { type filter hook prerouting priority raw; policy drop; }
add chain inet t n { type nat hook output priority 0; }
";
const RULES: [&str; 45] = [
    "c ip saddr vmap @m",
    "c meta l4proto . th dport . ip daddr @s accept",
    "c tcp dport { 1, 3-5, 6-9, 65535 } drop",
    "c ip daddr != { 10.0.0.1, 10.0.0.2 } goto other",
    "c meta mark set ct mark or 0x10",
    "c ct mark set meta mark and 0xff",
    "c counter name n log prefix \"seen \" group 7",
    "c log prefix \"seen \" level debug flags all",
    "c limit rate over 3/minute burst 9 packets drop",
    "c limit rate 3 kbytes/second accept",
    "c limit name l counter name tcp dport map @o accept",
    "c quota name q drop",
    "c quota over 3 mbytes drop",
    "c tcp flags & (syn | ack) == syn meta priority set 1:2",
    "c ip6 saddr fe80::/10 iifname { lo, \"eth*\" } return",
    "c tcp option maxseg size set 1400",
    "c tcp option maxseg size 1-500 drop",
    "c reset tcp option fastopen",
    "c ip option rr exists drop",
    "c ip6 nexthdr tcp exthdr frag exists accept",
    "c ct count over 20 counter packets 9 bytes 99 reject",
    "c reject with icmpx type admin-prohibited",
    "c meta l4proto tcp tproxy ip to 127.0.0.1:15006 accept",
    "c numgen inc mod 3 vmap { 0 : accept, 1 : drop, 2 : continue } comment \"by turns\"",
    "c numgen random mod 3 offset 7 8 accept",
    "c jhash ip saddr mod 3 seed 0xbeef 2 accept",
    "c ip ttl set 5",
    "c udp dport 53 ct zone set 3",
    "c udp dport 53 notrack",
    "c ct timeout set \"t\"",
    "c update @d { ip saddr counter }",
    "c ct state established,related ct direction reply accept",
    "c meta day 0-3 meta hour 60-90 accept",
    "c socket transparent 1 socket mark 0x10 accept",
    "c fib saddr . iif oif missing drop",
    "c fib daddr type local accept",
    "c icmp type { echo-request, echo-reply } accept",
    "c ether saddr 00:01:02:03:04:05 vlan id 7 accept",
    "c meta nftrace set 1",
    "n ip daddr 10.0.0.1 tcp dport 9 dnat ip to 10.0.0.2:80-90 random",
    "n dnat ip to tcp dport map { 1 : 10.0.0.1, 2 : 10.0.0.2 }",
    "n meta l4proto tcp redirect to :1-9 fully-random",
    "n meta skuid 1337 meta skgid != 7 return",
    "n ip6 daddr fd00::1 tcp dport 9 dnat ip6 to [fd00::2]:7",
    "n oifname != lo meta cgroup 7 accept",
];

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

/// Lays rules in a namespace; says so where that cannot be done.
fn laid(program: &str, rules: &str) -> Result<Option<Other>> {
    let other = Other::new()?;
    let words: Vec<_> = program.split(' ').collect();
    match within(&other.path(), &words, rules) {
        Ok(_) => Ok(Some(other)),
        Err(error) => {
            husk_skip::skipped(error);
            Ok(None)
        }
    }
}

/// Has the agent make what a namespace has, and lists that again: it is the same. Returns what the agent was told.
async fn carried(agent: &Agent, path: &Path, what: &str) -> Result<NetworkState> {
    let (laid, answer) = tell(agent, path).await?;
    assert_eq!(laid.refused(&answer.filter_refused), [], "{what}");
    assert_eq!(laid.uncarried, [], "{what}");
    assert!(answer.refused.is_empty(), "{answer:?}");
    assert!(!laid.nftables.is_empty() || !laid.xtables.is_empty(), "{what}");
    let made = filter(&agent.network()?).await?;
    assert_eq!(laid.nftables.len(), made.nftables.len(), "{what}");
    for (laid, made) in laid.nftables.iter().zip(&made.nftables) {
        assert_eq!(laid.messages.len(), made.messages.len(), "{what}");
        for (laid, made) in laid.messages.iter().zip(&made.messages) {
            assert_eq!(laid, made, "{what}");
        }
    }
    // The bytes of these say nothing to a reader. Such tables stay where they have been made once.
    assert!(laid.xtables.iter().all(|table| made.xtables.contains(table)), "{what}");
    let mut state = NetworkState::new();
    state.nftables.clone_from(&laid.nftables);
    state.xtables.clone_from(&laid.xtables);
    Ok(state)
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

/// Returns a program's listing of a namespace, without what is counted and numbered, the tables in order.
fn listing(namespace: &Path, program: &str) -> Result<String> {
    let words: Vec<_> = program.split(' ').collect();
    let listed = within(namespace, &words, "")?;
    let kept = listed.lines().filter(|line| !line.starts_with('#'));
    let lines: Vec<_> = kept.map(|line| line.split(" [").next().unwrap_or(line)).collect();
    let mut tables: Vec<_> = lines.split_inclusive(|line| *line == "COMMIT").collect();
    tables.sort_unstable();
    Ok(tables.concat().join("\n"))
}

#[test]
fn tables_are_the_same_in_the_guest() -> Result<()> {
    with_agent(|agent| async move {
        for (program, rules, lister) in [
            ("iptables-nft-restore", REDIRECTS, "iptables-nft-save"),
            ("nft -f -", NFTABLES, "nft -s list ruleset"),
            ("iptables-legacy-restore", REDIRECTS, "iptables-legacy-save"),
            ("ip6tables-legacy-restore", SIXTH, "ip6tables-legacy-save"),
        ] {
            let Some(other) = laid(program, rules)? else { continue };
            carried(&agent, &other.path(), program).await?;
            let made = listing(&agent.network()?, lister)?;
            assert_eq!(made, listing(&other.path(), lister)?, "{program}");
            clear(&agent).await?;
            assert!(filter(&agent.network()?).await?.nftables.is_empty(), "{program}");
        }
        let Some(other) = laid("nft -f -", NAMELESS)? else { return agent.end().await };
        carried(&agent, &other.path(), "nft").await?;
        agent.end().await
    })
}

#[test]
fn any_rules_are_the_same_in_the_guest() -> Result<()> {
    with_agent(|agent| async move {
        let mut random = proptest::test_runner::TestRunner::deterministic();
        let some = proptest::sample::subsequence(RULES.to_vec(), 1..RULES.len()).prop_shuffle();
        for _ in 0..24 {
            let rules = some.new_tree(&mut random).map_err(anyhow::Error::msg)?.current();
            let rules: Vec<_> =
                rules.iter().map(|rule| format!("add rule inet t {rule}\n")).collect();
            let Some(other) = laid("nft -f -", &format!("{TABLE}{}", rules.concat()))? else {
                break;
            };
            // Over what was there before, which is replaced.
            carried(&agent, &other.path(), &rules.concat()).await?;
        }
        agent.end().await
    })
}

#[test]
fn what_is_refused_is_named_and_leaves_the_table_as_it_was() -> Result<()> {
    with_agent(|agent| async move {
        let Some(other) = laid("iptables-nft-restore", REDIRECTS)? else {
            return agent.end().await;
        };
        let mut state = carried(&agent, &other.path(), "iptables-nft").await?;
        let laid = filter(&other.path()).await?;
        let network = agent.network()?;
        let before = listing(&network, "iptables-nft-save")?;
        // Of one table, a rule has an expression that there is not; another table has changed too.
        let find = |name: &str| laid.nftables.iter().position(|table| table.name == name);
        let (nat, raw) = (find("nat").context("nat")?, find("raw").context("raw")?);
        let broken = state.nftables[nat].messages.iter_mut().rev();
        for rule in
            broken.filter(|message| message.attributes.windows(6).any(|w| w == b"target")).take(2)
        {
            let at = rule.attributes.windows(6).position(|w| w == b"target").context("a target")?;
            rule.attributes[at] = b'T';
        }
        state.nftables[raw].messages.pop();
        let answer = agent.update_network(&state).await?;
        let [refused] = &laid.refused(&answer.filter_refused)[..] else {
            anyhow::bail!("{answer:?}")
        };
        // The first of the two.
        assert!(refused.what.contains("rule (REDIRECT)"), "{refused:?}");
        assert!(refused.what.contains("chain MESH_IN in table ip nat"), "{refused:?}");
        assert!(refused.reason.contains("does not have"), "{refused:?}");
        let after = listing(&network, "iptables-nft-save")?;
        assert_eq!(after, before.replace(RAW_RULE, ""));
        // It is tried again with the next state; and what a container has removed stays away.
        let answer = agent.update_network(&state).await?;
        assert_eq!(answer.filter_refused.len(), 1);
        within(&network, &["nft", "delete", "table", "ip", "raw"], "")?;
        let (_, answer) = tell(&agent, &other.path()).await?;
        assert!(answer.filter_refused.is_empty(), "{answer:?}");
        assert_eq!(listing(&network, "iptables-nft-save")?, before);
        within(&network, &["nft", "delete", "table", "ip", "raw"], "")?;
        clear(&agent).await?;
        assert_eq!(listing(&network, "iptables-nft-save")?, "");
        agent.end().await
    })
}

#[test]
fn a_table_joins_what_a_container_has_laid() -> Result<()> {
    with_agent(|agent| async move {
        let network = agent.network()?;
        let own = "-w -t nat -A OUTPUT -p udp -j ACCEPT";
        let words: Vec<_> = ["iptables-nft"].into_iter().chain(own.split(' ')).collect();
        if let Err(error) = within(&network, &words, "") {
            husk_skip::skipped(error);
            return agent.end().await;
        }
        let Some(other) = laid("iptables-nft-restore", REDIRECTS)? else {
            return agent.end().await;
        };
        let (_, answer) = tell(&agent, &other.path()).await?;
        assert!(answer.filter_refused.is_empty(), "{answer:?}");
        let made = listing(&network, "iptables-nft-save")?;
        assert!(made.contains("-A OUTPUT -p udp -j ACCEPT"), "{made}");
        assert!(made.contains("-A OUTPUT -p tcp -j MESH_OUT"), "{made}");
        agent.end().await
    })
}

#[test]
fn a_table_of_the_older_iptables_that_is_malformed_is_refused() -> Result<()> {
    with_agent(|agent| async move {
        let Some(other) = laid("iptables-legacy-restore", REDIRECTS)? else {
            return agent.end().await;
        };
        let laid = filter(&other.path()).await?;
        let malformed: [fn(&mut XtablesTable); 5] = [
            |table| table.name = "n".repeat(40),
            |table| table.hook_entries.truncate(4),
            |table| table.entry_count += 1,
            |table| table.entries.truncate(100),
            |table| table.ipv6 = true,
        ];
        for (number, change) in malformed.iter().enumerate() {
            let mut state = NetworkState::new();
            state.xtables.push(laid.xtables[0].clone());
            change(&mut state.xtables[0]);
            let answer = agent.update_network(&state).await?;
            assert_eq!(laid.refused(&answer.filter_refused).len(), 1, "{number}");
        }
        agent.end().await
    })
}

/// Connections that a container dials are redirected to its proxy, but for those of the proxy.
#[test]
fn rules_are_carried_out_for_the_users_that_they_name() -> Result<()> {
    const RULE: &str =
        "-A OUTPUT -d 127.0.0.9/32 -p tcp -m owner ! --uid-owner 1337 -j REDIRECT --to-ports 15001";
    with_agent(|agent| async move {
        for program in ["iptables-nft-restore", "iptables-legacy-restore"] {
            let rules = format!("*nat\n{RULE}\nCOMMIT\n");
            let Some(other) = laid(program, &rules)? else { continue };
            let dial = "nc -ll -p 15001 -e echo proxy & sleep 1; nc 127.0.0.9 80 </dev/null; \
                        kill $!; exit 0";
            for (user, said) in [(0, "proxy\n"), (1337, "")] {
                carried(&agent, &other.path(), program).await?;
                let change = |spec: &mut serde_json::Value| {
                    spec["process"]["user"]["uid"] = user.into();
                    // As in the guest, where containers share the one that there is.
                    if let Some(all) = spec["linux"]["namespaces"].as_array_mut() {
                        all.retain(|one| one["type"] != "network");
                    }
                };
                let ran = crate::shell(&agent, dial, change).await?;
                assert_eq!(ran.output(), said, "{program}, user {user}: {}", ran.error());
            }
            clear(&agent).await?;
        }
        agent.end().await
    })
}
