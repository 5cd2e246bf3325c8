//! In a namespace of the test's own, with rules that programs of the host's lay.

use husk_agent_protocols::agent::FilterRefusal;

use super::super::tests::{Own, lay, lay_rules};
use super::super::{Found, Namespace};
use super::*;

/// As Docker lays them for its name server, and what a service mesh's CNI plugin adds.
const DOCKERS: [&str; 6] = [
    "-w -t nat -N DOCKER_OUTPUT",
    "-w -t nat -N DOCKER_POSTROUTING",
    "-w -t nat -A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT",
    "-w -t nat -A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING",
    "-w -t nat -A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp --dport 53 -j DNAT --to 127.0.0.11:40000",
    "-w -t nat -A DOCKER_POSTROUTING -s 127.0.0.11/32 -p udp --sport 40000 -j SNAT --to :53",
];
const MESHS: [&str; 4] = [
    "-w -t nat -N MESH_OUTPUT",
    "-w -t nat -A OUTPUT -p tcp -j MESH_OUTPUT",
    "-w -t nat -A MESH_OUTPUT -d 127.0.0.1/32 -j RETURN",
    "-w -t nat -A MESH_OUTPUT -p tcp -j REDIRECT --to-ports 15001",
];

fn list(namespace: &Namespace) -> Filter {
    namespace.filter(&Interfaces::new(), &[]).unwrap()
}

/// Names of all that the filter holds.
fn names(filter: &Filter) -> String {
    let carried = filter.names.iter().flatten().cloned();
    let uncarried = filter.uncarried.iter().map(|one| one.what.clone());
    carried.chain(uncarried).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn rules_are_carried_but_for_dockers() {
    for program in ["iptables-nft", "iptables-legacy"] {
        let Some(own) = Own::new() else { return };
        let namespace = Namespace::open(&own.path).unwrap();
        assert_eq!(names(&list(&namespace)), "");
        // Listing makes a table with its chains, which let everything pass.
        if !lay_rules(&namespace, program, &["-w -t nat -L -n"]) {
            continue;
        }
        assert_eq!(names(&list(&namespace)), "", "{program}");
        assert!(lay_rules(&namespace, program, &DOCKERS), "{program}");
        assert_eq!(names(&list(&namespace)), "", "{program}");
        assert!(lay_rules(&namespace, program, &MESHS), "{program}");
        let filter = list(&namespace);
        assert_eq!((filter.nftables.len() + filter.xtables.len(), filter.names.len()), (1, 1));
        let all = names(&filter);
        assert!(all.contains("nat") && !all.contains("DNAT"), "{program}: {all}");
        // Of the guest, the numbers that mean something are named, and no others.
        let refused = |table, message| {
            let error = libc::ENOENT;
            filter.refused(&[FilterRefusal { table, message, error, ..Default::default() }])
        };
        let last = u32::try_from(filter.names[0].len() - 1).unwrap();
        let one = refused(0, last);
        assert!(one[0].what.contains("REDIRECT") || one[0].what.contains("redir"), "{one:?}");
        assert!(one[0].reason.contains("does not have"), "{one:?}");
        assert!(refused(0, u32::MAX)[0].what.contains("nat"), "{program}");
        assert_eq!(refused(7, 0), [], "{program}");
        // A policy needs no rule.
        assert!(lay_rules(&namespace, program, &["-w -P OUTPUT DROP"]), "{program}");
        assert_eq!(list(&namespace).names.len(), 2, "{program}");
        assert!(names(&list(&namespace)).contains("filter"), "{program}");
    }
}

/// The entries of a table in which Docker's no longer match.
#[tokio::test]
async fn dockers_entries_of_a_legacy_table_match_nothing() {
    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    if !lay_rules(&namespace, "iptables-legacy", &DOCKERS) {
        return;
    }
    assert!(lay_rules(&namespace, "iptables-legacy", &MESHS));
    // One of everything but Docker's address is no rule of Docker's.
    let inverted = "-w -t nat -A OUTPUT ! -d 127.0.0.11/32 -p tcp -j MESH_OUTPUT";
    assert!(lay_rules(&namespace, "iptables-legacy", &[inverted]));
    let filter = list(&namespace);
    let table = &filter.xtables[0];
    let address = [127, 0, 0, 11];
    let count = table.entries.windows(4).filter(|bytes| *bytes == address).count();
    // The inverted one's; of those that match nothing any more, a source, and what one would translate to
    // (lowest and highest).
    assert_eq!(count, 4);
    assert!(
        filter.names[0][0].contains("(REDIRECT) of table nat of iptables-legacy (and 3 more)"),
        "{:?}",
        filter.names
    );
    // What the guest has stays its own when it has become empty.
    let flush = ["-w -t nat -F", "-w -t nat -X"];
    assert!(lay_rules(&namespace, "iptables-legacy", &flush));
    assert!(list(&namespace).xtables.is_empty());
    let emptied = namespace.filter(&Interfaces::new(), &filter.xtables).unwrap();
    assert_eq!(emptied.xtables.len(), 1);
    assert!(emptied.xtables[0].entries.len() < table.entries.len());
}

#[tokio::test]
async fn what_is_the_hosts_own_is_named() {
    for program in ["iptables-nft", "iptables-legacy"] {
        let Some(own) = Own::new() else { return };
        let namespace = Namespace::open(&own.path).unwrap();
        let rule = ["-w -A OUTPUT -m cgroup --cgroup 1 -j DROP"];
        if !lay_rules(&namespace, program, &rule) {
            continue;
        }
        let filter = list(&namespace);
        assert!(filter.nftables.is_empty() && filter.xtables.is_empty(), "{program}");
        let [one] = filter.uncarried.as_slice() else { panic!("{program}: {filter:?}") };
        assert!(one.what.contains("OUTPUT") || one.what.contains("DROP"), "{one:?}");
        assert!(one.reason.contains("control group"), "{one:?}");
    }
}

#[tokio::test]
async fn numbers_of_interfaces_become_their_names() {
    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    lay(namespace.netlink()).await;
    let table = [
        "add table inet t",
        "add chain inet t c { type filter hook input priority 0 ; }",
        "add rule inet t c iif eth0 accept",
        "add rule inet t c iif lo accept",
    ];
    if !lay_rules(&namespace, "nft", &table) {
        return;
    }
    let found = Found::scan(&namespace).await.unwrap();
    let carried = namespace.filter(&found.names(), &[]).unwrap();
    let messages = &carried.nftables[0].messages;
    let has = |bytes: &[u8]| messages.iter().any(|m| m.attributes.windows(5).any(|w| w == bytes));
    assert!(carried.uncarried.is_empty() && has(b"eth0\0"), "{:?}", carried.uncarried);
    // One that the guest does not have.
    let nowhere = list(&namespace);
    assert!(nowhere.nftables.is_empty(), "{nowhere:?}");
    assert!(nowhere.uncarried[0].reason.contains("interface"), "{:?}", nowhere.uncarried);
    assert!(nowhere.uncarried[0].what.contains("chain c in table inet t"), "{nowhere:?}");
}

#[tokio::test]
async fn changes_are_heard() {
    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    let heard = || tokio::time::timeout(std::time::Duration::from_secs(10), namespace.changed());
    if !lay_rules(&namespace, "iptables-nft", &["-w -A OUTPUT -p tcp -j ACCEPT"]) {
        return;
    }
    assert!(heard().await.unwrap());
    let more = std::time::Duration::from_millis(50);
    assert!(tokio::time::timeout(more, namespace.changed()).await.is_err(), "heard twice");
    assert!(lay_rules(&namespace, "iptables-nft", &["-w -F OUTPUT"]));
    assert!(heard().await.unwrap());
}
