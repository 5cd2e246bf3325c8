//! In a namespace of the test's own, with a veth pair, bridges and taps.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::mpsc;

use futures::TryStreamExt;
use husk_agent_protocols::agent::NetworkState;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use rtnetlink::packet_core::Parseable;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::*;

/// A namespace that lives as long as this does.
pub struct Own {
    pub path: PathBuf,
    _end: mpsc::Sender<()>,
}

impl Own {
    pub fn new() -> Option<Self> {
        let (told, heard) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET).is_ok();
            let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid());
            let _ = told.send(made.then(|| path.into()));
            let _ = ended.recv();
        });
        match heard.recv().unwrap() {
            Some(path) => Some(Self { path, _end: end }),
            None => {
                husk_skip::skipped("namespaces need root");
                None
            }
        }
    }
}

async fn index(netlink: &Handle, name: &str) -> u32 {
    let listed = netlink.link().get().match_name(name.to_owned()).execute();
    listed.try_collect::<Vec<_>>().await.unwrap()[0].header.index
}

/// As a CNI plugin leaves it: eth0 with an address and a default route.
pub async fn lay(netlink: &Handle) {
    netlink.link().add(LinkVeth::new("eth0", "peer").build()).execute().await.unwrap();
    for name in ["eth0", "peer"] {
        let up = LinkUnspec::new_with_name(name).mtu(1400).up().build();
        netlink.link().set(up).execute().await.unwrap();
    }
    let eth0 = index(netlink, "eth0").await;
    let ip = Ipv4Addr::new(10, 7, 0, 2);
    netlink.address().add(eth0, ip.into(), 24).execute().await.unwrap();
    let gateway = Ipv4Addr::new(10, 7, 0, 1);
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).priority(50).build();
    netlink.route().add(route).execute().await.unwrap();
}

fn state(found: &Found) -> NetworkState {
    let devices: Vec<_> = found.interfaces.iter().map(|one| (one, [2; 6])).collect();
    found.state(&devices)
}

#[tokio::test]
async fn what_a_plugin_lays_is_found_and_told() {
    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    let found = Found::scan(&namespace).await.unwrap();
    assert!(found.interfaces.is_empty() && state(&found) == NetworkState::new());

    lay(namespace.netlink()).await;
    assert!(namespace.changed().await);
    let mut found = Found::scan(&namespace).await.unwrap();
    // The peer has a link-local address only.
    found.interfaces.retain(|one| one.name == "eth0");
    let told = state(&found);
    assert_eq!(told.interfaces[0].name, "eth0");
    assert_eq!((told.interfaces[0].mtu, told.interfaces[0].device.len()), (1400, 6));
    let addresses = told.addresses.iter().map(|one| AddressMessage::parse(one).unwrap());
    let addresses: Vec<_> = addresses.collect();
    assert!(addresses.iter().all(|one| one.header.index == LOOPBACK + 1));
    let ip = AddressAttribute::Local(Ipv4Addr::new(10, 7, 0, 2).into());
    assert!(addresses.iter().any(|one| one.attributes.contains(&ip)), "{addresses:?}");
    // The connected one the guest's kernel makes by itself.
    assert_eq!(told.routes.len(), 1);
    let route = RouteMessage::parse(&told.routes[0]).unwrap();
    assert_eq!(route.header.destination_prefix_length, 0);
    assert!(route.attributes.contains(&RouteAttribute::Priority(50)), "{route:?}");
    assert!(route.attributes.contains(&RouteAttribute::Oif(LOOPBACK + 1)), "{route:?}");
    assert!(told.rules.is_empty() && told.neighbours.is_empty());
}

#[tokio::test]
async fn interfaces_are_joined_and_left_as_they_were() {
    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    let netlink = namespace.netlink();
    lay(netlink).await;
    let eth0 = index(netlink, "eth0").await;
    let tap = match Tap::create(&namespace, eth0, 2) {
        Err(NetworkError::Tap(error)) => return eprintln!("skipped: no taps here: {error}"),
        tap => tap.unwrap(),
    };
    assert_eq!((tap.name.clone(), tap.queues.len()), (format!("husk{eth0}"), 2));
    let number = Found::index_of(&namespace, &tap.name).await.unwrap();
    redirect::join(netlink, eth0, number).await.unwrap();
    // What is carried stays, without an address and down.
    let addresses = netlink.address().get().set_link_index_filter(eth0).execute();
    for address in addresses.try_collect::<Vec<_>>().await.unwrap() {
        netlink.address().del(address).execute().await.unwrap();
    }
    let there = |found: &Found| found.interfaces.iter().find(|one| one.index == eth0).cloned();
    let bare = there(&Found::scan(&namespace).await.unwrap()).unwrap();
    assert!(bare.up && !bare.has_address && !bare.is_ready());
    let down = LinkUnspec::new_with_index(eth0).down().build();
    netlink.link().set(down).execute().await.unwrap();
    let found = Found::scan(&namespace).await.unwrap();
    assert!(state(&found).interfaces.iter().any(|one| one.name == "eth0" && one.down));
    // A tap that another sandbox has there is no interface to carry.
    let found = Found::scan(&namespace).await.unwrap();
    assert!(found.interfaces.iter().all(|one| one.index != number));
    // One that a killed sandbox left is taken over.
    drop(tap);
    let tap = Tap::create(&namespace, eth0, 1).unwrap();
    let number = Found::index_of(&namespace, &tap.name).await.unwrap();
    redirect::join(netlink, eth0, number).await.unwrap();

    redirect::part(netlink, eth0).await;
    let left = netlink.qdisc().get().execute().try_collect::<Vec<_>>().await.unwrap();
    assert!(left.iter().all(|one| one.header.index != eth0.cast_signed()
        || one.header.parent != rtnetlink::packet_route::tc::TcHandle::INGRESS));
    redirect::join(netlink, eth0, number).await.unwrap();
    redirect::clear(&own.path);
    // Someone else's stays, and is not built upon.
    netlink.qdisc().add(eth0.cast_signed()).ingress().execute().await.unwrap();
    let occupied = redirect::join(netlink, eth0, number).await;
    assert!(matches!(occupied, Err(NetworkError::Occupied)), "{occupied:?}");
    redirect::part(netlink, eth0).await;
    netlink.qdisc().add(eth0.cast_signed()).ingress().execute().await.unwrap_err();
}

/// Has a program of the host's lay rules in the namespace; false where there is none, or the kernel has not what
/// it needs.
pub fn lay_rules(namespace: &Namespace, program: &str, rules: &[&str]) -> bool {
    rules.iter().all(|rule| {
        let run = || {
            let words: Vec<_> = rule.split(' ').collect();
            std::process::Command::new(program).args(words).output()
        };
        match namespace.within(run) {
            Ok(output) if output.status.success() => true,
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                husk_skip::skipped(format!("{program} {rule}: {}", error.trim()));
                false
            }
            Err(error) => {
                husk_skip::skipped(format!("{program}: {error}"));
                false
            }
        }
    })
}

#[tokio::test]
async fn what_is_dialled_at_a_loopback_address_is_accepted_whatever_the_port() {
    use std::io::{Read, Write};

    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    let lo = || LinkUnspec::new_with_index(LOOPBACK).up().build();
    // An address of the namespace's own is none of the loopback's.
    namespace.netlink().link().set(lo()).execute().await.unwrap();
    let other = Ipv4Addr::new(10, 7, 0, 9);
    namespace.netlink().address().add(LOOPBACK, other.into(), 32).execute().await.unwrap();
    let loopback = match Loopback::open(&namespace) {
        // Such programs came with Linux 5.9.
        Err(error) => return eprintln!("skipped: {error}"),
        Ok(loopback) => loopback,
    };
    let dial = |address: &str| {
        let address: std::net::SocketAddr = address.parse().unwrap();
        namespace.within(|| std::net::TcpStream::connect(address))
    };
    for address in ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:8080"] {
        let mut client = dial(address).unwrap();
        let (stream, dialled) = loopback.accept().await.unwrap();
        assert_eq!(dialled.to_string(), address);
        client.write_all(b"ask").unwrap();
        let mut served = stream.into_std().unwrap();
        served.set_nonblocking(false).unwrap();
        let mut asked = [0; 3];
        served.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"ask");
    }
    let refused = std::io::ErrorKind::ConnectionRefused;
    assert_eq!(dial("10.7.0.9:80").unwrap_err().kind(), refused);
    drop(loopback);
    assert_eq!(dial("127.0.0.1:80").unwrap_err().kind(), refused);
}

#[tokio::test]
async fn the_name_server_in_the_namespace_is_asked() {
    use husk_agent_protocols::resolver::{ADDRESS, Carrier, PORT};
    use std::io::{Read, Write};

    let Some(own) = Own::new() else { return };
    let namespace = Namespace::open(&own.path).unwrap();
    // Nobody is there yet.
    resolver::ask(&namespace, Carrier::Tcp, b"?").await.unwrap_err();
    let lo = LinkUnspec::new_with_index(LOOPBACK).up().build();
    namespace.netlink().link().set(lo).execute().await.unwrap();
    resolver::ask(&namespace, Carrier::Udp, b"?").await.unwrap_err();
    let (packets, listener) = namespace
        .within(|| {
            let packets = std::net::UdpSocket::bind((ADDRESS, PORT))?;
            Ok((packets, std::net::TcpListener::bind((ADDRESS, PORT))?))
        })
        .unwrap();
    std::thread::spawn(move || {
        let mut question = [0; 3];
        let (_, from) = packets.recv_from(&mut question).unwrap();
        packets.send_to(&[&question[..], b" packet"].concat(), from).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = [0; 5];
        stream.read_exact(&mut question).unwrap();
        assert_eq!(&question, b"\0\x03two");
        stream.write_all(&[&60_000_u16.to_be_bytes()[..], &[7; 60_000]].concat()).unwrap();
    });
    let answer = resolver::ask(&namespace, Carrier::Udp, b"one").await.unwrap();
    assert_eq!(answer, b"one packet");
    let answer = resolver::ask(&namespace, Carrier::Tcp, b"two").await.unwrap();
    assert_eq!(answer, [7; 60_000]);
}
