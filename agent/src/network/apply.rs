//! The network as the host told it last, and how the next state comes about.

use std::fs;
use std::io;
use std::mem;
use std::path::PathBuf;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::change::{self, Kind, Numbers};
use super::device::{self, Device};
use super::filter::{self, Filter, Refusal};
use super::netlink::Netlink;

/// The number of the loopback device in every namespace, and its position in every state.
const LOOPBACK: u32 = 1;

/// `IFNAMSIZ`, without the end of the string.
const LONGEST_NAME: usize = 15;

/// What the guest's network is to be. See the contract for the messages.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub interfaces: Vec<WantedInterface>,
    pub addresses: Vec<Vec<u8>>,
    pub routes: Vec<Vec<u8>>,
    pub neighbours: Vec<Vec<u8>>,
    pub rules: Vec<Vec<u8>>,
    pub filter: Filter,
}

/// Parts of a state that the kernel refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refused {
    /// Each part of the network, and the reason.
    pub texts: Vec<String>,
    /// Tables of the packet filter.
    pub filter: Vec<Refusal>,
}

/// An interface of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedInterface {
    /// The hardware address that its device was made with.
    pub device: Vec<u8>,
    pub name: String,
    pub address: Vec<u8>,
    pub mtu: u32,
    /// Whether it is set down.
    pub down: bool,
}

impl State {
    /// Its messages of a kind.
    pub fn of(&self, kind: Kind) -> &[Vec<u8>] {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Route => &self.routes,
            Kind::Neighbour => &self.neighbours,
            Kind::Rule => &self.rules,
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut Vec<Vec<u8>> {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Route => &mut self.routes,
            Kind::Neighbour => &mut self.neighbours,
            Kind::Rule => &mut self.rules,
        }
    }
}

/// The guest's network.
pub struct Network {
    /// Where sysfs is: what is written there changes the machine.
    sys: PathBuf,
    told: State,
    /// Tables of the packet filter that was told, as far as the kernel has them.
    filter: Filter,
    /// The guest's numbers of what was told.
    numbers: Numbers,
}

/// Brings the loopback device up; its addresses come by themselves.
pub fn loopback_up() -> io::Result<()> {
    Netlink::open()?.change(set(LOOPBACK, Some(true), Vec::new()), 0)
}

impl Network {
    /// One that has nothing but the loopback device yet.
    pub fn new(sys: PathBuf) -> Self {
        Self { sys, told: State::default(), filter: Filter::default(), numbers: Numbers::default() }
    }

    /// Makes the network what `state` says; returns what the kernel refused of it.
    pub fn apply(&mut self, mut state: State) -> io::Result<Refused> {
        let mut netlink = Netlink::open()?;
        let filter = mem::take(&mut state.filter);
        self.take_away(&mut netlink, &state);
        let addresses: Vec<_> = state.interfaces.iter().map(|i| i.device.as_slice()).collect();
        let devices = device::find(&mut netlink, &self.sys, &addresses)?;
        let texts = self.bring(&mut netlink, state, devices)?;
        // Chains may name interfaces.
        Ok(Refused { texts, filter: filter::apply(&mut self.filter, filter)? })
    }

    /// Brings the state about, each of its interfaces by the device found for it.
    fn bring(
        &mut self,
        netlink: &mut Netlink,
        mut state: State,
        devices: Vec<Option<Device>>,
    ) -> io::Result<Vec<String>> {
        let mut refused = Vec::new();
        let numbers = set_interfaces(netlink, &state.interfaces, devices, &mut refused)?;
        // What is there is left alone, unless the device behind it is another one.
        let same =
            numbers.iter().all(|(at, index)| self.numbers.get(at).is_none_or(|i| i == index));
        for kind in Kind::ALL {
            let told = if same { self.told.of(kind) } else { &[] };
            let new = state.of(kind).iter().filter(|one| !told.contains(one));
            // A way through a gateway needs the way to the gateway, which may stand behind it.
            let mut waiting: Vec<_> = new.cloned().collect();
            loop {
                let before = waiting.len();
                let mut failed = Vec::new();
                waiting.retain(|message| {
                    let added = change::add(netlink, kind, message, &numbers);
                    added.map_err(|error| failed.push(error)).is_err()
                });
                if waiting.is_empty() || waiting.len() == before {
                    let name = kind.name();
                    refused.extend(failed.iter().map(|error| format!("{name}: {error}")));
                    break;
                }
            }
            // Tried again with the next state.
            state.of_mut(kind).retain(|message| !waiting.contains(message));
        }
        self.told = state;
        self.numbers = numbers;
        Ok(refused)
    }

    /// Takes away what the new state does not have, in the reverse order.
    fn take_away(&mut self, netlink: &mut Netlink, state: &State) {
        // Positions mean the same only if one list of interfaces begins with the other.
        let devices = |state: &State| -> Vec<_> {
            state.interfaces.iter().map(|one| one.device.clone()).collect()
        };
        let (old, new) = (devices(&self.told), devices(state));
        let same = new.starts_with(&old) || old.starts_with(&new);
        for kind in Kind::ALL.into_iter().rev() {
            for message in self.told.of(kind) {
                if !same || !state.of(kind).contains(message) {
                    // It may have gone with what it needed.
                    let _ = change::remove(netlink, kind, message, &self.numbers);
                }
            }
        }
        for one in &self.told.interfaces {
            if !new.contains(&one.device) {
                // A container may have renamed or removed it.
                let _ = device::remove(&self.sys, &one.name);
            }
        }
        if !same {
            self.told = State::default();
        }
    }
}

fn set_interfaces(
    netlink: &mut Netlink,
    wanted: &[WantedInterface],
    devices: Vec<Option<Device>>,
    refused: &mut Vec<String>,
) -> io::Result<Numbers> {
    let mut numbers = Numbers::from([(LOOPBACK, LOOPBACK)]);
    make_room(netlink, wanted, &devices)?;
    for ((one, device), position) in wanted.iter().zip(devices).zip(LOOPBACK + 1..) {
        let Some(device) = device else {
            refused.push(format!("interface {}: its device did not come", one.name));
            continue;
        };
        if let Err(error) = set_interface(netlink, one, &device) {
            refused.push(format!("interface {}: {error}", one.name));
        }
        numbers.insert(position, device.index);
    }
    Ok(numbers)
}

/// Devices that bear a name which another is to have get one that nobody wants.
fn make_room(
    netlink: &mut Netlink,
    wanted: &[WantedInterface],
    devices: &[Option<Device>],
) -> io::Result<()> {
    for (one, device) in wanted.iter().zip(devices) {
        let Some(device) = device else { continue };
        let taken = wanted.iter().any(|other| other.name == device.name && other != one);
        if taken && device.name != one.name {
            let name = LinkAttribute::IfName(format!("husk{}", device.index));
            netlink.change(set(device.index, Some(false), vec![name]), 0)?;
        }
    }
    Ok(())
}

fn set_interface(
    netlink: &mut Netlink,
    wanted: &WantedInterface,
    device: &Device,
) -> io::Result<()> {
    let odd = |c: char| c == '/' || c.is_whitespace() || c == '\0';
    if wanted.name.is_empty() || wanted.name.len() > LONGEST_NAME || wanted.name.contains(odd) {
        return Err(io::Error::other("no name for an interface"));
    }
    let mut attributes = Vec::new();
    if device.address != wanted.address {
        attributes.push(LinkAttribute::Address(wanted.address.clone()));
    }
    if device.name != wanted.name {
        attributes.push(LinkAttribute::IfName(wanted.name.clone()));
    }
    // Name and address of a device that is up cannot be changed.
    if !attributes.is_empty() || (wanted.down && device.up) {
        netlink.change(set(device.index, Some(false), attributes), 0)?;
    }
    if device.mtu != wanted.mtu {
        netlink.change(set(device.index, None, vec![LinkAttribute::Mtu(wanted.mtu)]), 0)?;
    }
    if wanted.down {
        return Ok(());
    }
    if !device.up || device.name != wanted.name || device.address != wanted.address {
        // Its addresses are told, the link-local one too: it must not make another. Without
        // IPv6 there is no such file.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", wanted.name), "1");
        netlink.change(set(device.index, Some(true), Vec::new()), 0)?;
    }
    Ok(())
}

/// The message that sets something of a link, and whether it is up if that is told.
fn set(index: u32, up: Option<bool>, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    if let Some(up) = up {
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    }
    message.attributes = attributes;
    RouteNetlinkMessage::SetLink(message)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL};
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::address::{AddressAttribute, AddressMessage};
    use netlink_packet_route::link::{InfoKind, LinkInfo};
    use netlink_packet_route::route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    };
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// A sysfs in which each of two interfaces has its device on the bus: the one at /sys is the
    /// host's, whatever network namespace a thread is in.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let made = Self(tempfile::tempdir().unwrap());
            for name in ["eth0", "eth1"] {
                let device = format!("devices/{name}/virtio");
                let interface = made.path().join("class/net").join(name);
                fs::create_dir_all(made.path().join(&device)).unwrap();
                fs::create_dir_all(&interface).unwrap();
                std::os::unix::fs::symlink(made.path().join(device), interface.join("device"))
                    .unwrap();
            }
            made
        }
        fn path(&self) -> PathBuf {
            self.0.path().to_owned()
        }
        /// Whether the bus was told to let go of the interface's device.
        fn removed(&self, name: &str) -> bool {
            fs::read(self.path().join("devices").join(name).join("remove"))
                .is_ok_and(|text| text == b"1")
        }
    }

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn bytes(message: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn address(ip: [u8; 4]) -> Vec<u8> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 24;
        message.header.index = LOOPBACK + 1;
        let ip = IpAddr::from(ip);
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        bytes(&message)
    }

    fn route(to: [u8; 4], length: u8, gateway: Option<[u8; 4]>) -> Vec<u8> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = length;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope =
            if gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
        let inet = |ip| RouteAddress::Inet(Ipv4Addr::from(ip));
        message.attributes = vec![RouteAttribute::Oif(LOOPBACK + 1)];
        message.attributes.push(RouteAttribute::Destination(inet(to)));
        message.attributes.extend(gateway.map(|ip| RouteAttribute::Gateway(inet(ip))));
        bytes(&message)
    }

    /// In a thread with a network namespace of its own, with one more device.
    fn with_device(work: impl FnOnce(&mut Netlink, Device) + Send) {
        if !nix::unistd::geteuid().is_root() {
            return husk_skip::skipped("namespaces need root");
        }
        let work = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let mut netlink = Netlink::open().unwrap();
            let mut dummy = LinkMessage::default();
            dummy.attributes = vec![
                LinkAttribute::IfName("made".to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
            ];
            let flags = NLM_F_CREATE | NLM_F_EXCL;
            netlink.change(RouteNetlinkMessage::NewLink(dummy), flags).unwrap();
            let device = device(&mut netlink, "made");
            work(&mut netlink, device);
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    }

    fn device(netlink: &mut Netlink, name: &str) -> Device {
        let links = netlink.links().unwrap();
        links.iter().map(Device::of).find(|device| device.name == name).unwrap()
    }

    fn wanted(name: &str) -> WantedInterface {
        WantedInterface {
            device: vec![1; 6],
            name: name.to_owned(),
            address: MAC.to_vec(),
            mtu: 1400,
            down: false,
        }
    }

    fn table() -> String {
        fs::read_to_string("/proc/thread-self/net/route").unwrap()
    }

    #[test]
    fn a_device_wears_what_was_told_and_changes_with_it() {
        with_device(|netlink, made| {
            let sys = Sysfs::new();
            let mut network = Network::new(sys.path());
            let mut state = State { interfaces: vec![wanted("eth0")], ..State::default() };
            state.addresses = vec![address([10, 1, 0, 2])];
            // The way to the gateway stands behind the one that needs it.
            state.routes =
                vec![route([0; 4], 0, Some([10, 9, 0, 1])), route([10, 9, 0, 1], 32, None)];
            let refused = network.bring(netlink, state.clone(), vec![Some(made)]).unwrap();
            assert_eq!(refused, Vec::<String>::new());
            let worn = device(netlink, "eth0");
            assert_eq!((worn.address.as_slice(), worn.mtu, worn.up), (&MAC[..], 1400, true));
            // Default, connected, host: addresses there are numbers of the machine's byte order.
            assert_eq!(table().lines().count(), 4, "{}", table());
            assert!(table().contains("eth0\t00000000\t0100090A"), "{}", table());

            state.addresses = vec![address([10, 2, 0, 2])];
            state.routes.remove(0);
            network.take_away(netlink, &state);
            let refused = network.bring(netlink, state.clone(), vec![Some(worn)]).unwrap();
            assert_eq!(refused, Vec::<String>::new());
            assert!(!table().contains("0100090A\t0003") && !table().contains("0000010A"));
            assert!(table().contains("0000020A"), "{}", table());
        });
    }

    #[test]
    fn what_the_kernel_refuses_is_told_and_tried_again() {
        with_device(|netlink, made| {
            let sys = Sysfs::new();
            let mut network = Network::new(sys.path());
            let mut state = State { interfaces: vec![wanted("a/b")], ..State::default() };
            state.routes = vec![route([0; 4], 0, Some([10, 1, 0, 1])), vec![1, 2, 3]];
            let refused = network.bring(netlink, state.clone(), vec![Some(made)]).unwrap();
            assert_eq!(refused.len(), 3, "{refused:?}");
            assert!(refused[0].starts_with("interface a/b: no name"), "{refused:?}");
            state.interfaces[0].name = "b".to_owned();
            state.addresses = vec![address([10, 1, 0, 2])];
            let made = device(netlink, "made");
            let refused = network.bring(netlink, state, vec![Some(made)]).unwrap();
            assert_eq!(refused.len(), 1, "{refused:?}");
            assert!(table().contains("b\t00000000\t0100010A"), "{}", table());
        });
    }

    #[test]
    fn an_interface_that_loses_its_address_or_is_set_down_stays() {
        with_device(|netlink, made| {
            let sys = Sysfs::new();
            let mut network = Network::new(sys.path());
            let mut state = State { interfaces: vec![wanted("eth0")], ..State::default() };
            state.addresses = vec![address([10, 1, 0, 2])];
            network.bring(netlink, state.clone(), vec![Some(made)]).unwrap();
            let bare = State { addresses: Vec::new(), ..state.clone() };
            let mut down = state.clone();
            down.interfaces[0].down = true;
            for (next, up, connected) in [
                (bare, true, false),
                (state.clone(), true, true),
                (down, false, false),
                (state, true, true),
            ] {
                network.take_away(netlink, &next);
                let device_now = device(netlink, "eth0");
                network.bring(netlink, next, vec![Some(device_now)]).unwrap();
                assert_eq!(device(netlink, "eth0").up, up);
                assert_eq!(table().contains("eth0\t0000010A"), connected, "{}", table());
            }
            assert!(!sys.removed("eth0"));
        });
    }

    #[test]
    fn what_stays_stays_when_another_goes() {
        with_device(|netlink, made| {
            let sys = Sysfs::new();
            let mut network = Network::new(sys.path());
            let mut other = LinkMessage::default();
            other.attributes = vec![
                LinkAttribute::IfName("other".to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
            ];
            let flags = NLM_F_CREATE | NLM_F_EXCL;
            netlink.change(RouteNetlinkMessage::NewLink(other), flags).unwrap();
            let mut second = wanted("eth1");
            second.device = vec![2; 6];
            let both = State {
                interfaces: vec![wanted("eth0"), second.clone()],
                addresses: vec![address([10, 1, 0, 2])],
                ..State::default()
            };
            let devices = vec![Some(made), Some(device(netlink, "other"))];
            network.bring(netlink, both.clone(), devices).unwrap();
            // The second goes.
            let first = State { interfaces: vec![wanted("eth0")], ..both.clone() };
            network.take_away(netlink, &first);
            assert!(sys.removed("eth1") && !sys.removed("eth0"));
            let devices = vec![Some(device(netlink, "eth0"))];
            network.bring(netlink, first, devices).unwrap();
            assert!(table().contains("eth0\t0000010A"), "{}", table());
            // And takes the place of the first.
            let other = State { interfaces: vec![second], ..both };
            network.take_away(netlink, &other);
            assert!(sys.removed("eth0"));
            let devices = vec![Some(device(netlink, "eth1"))];
            network.bring(netlink, other, devices).unwrap();
            assert!(table().contains("eth1\t0000010A"), "{}", table());
            assert!(!table().contains("eth0"), "{}", table());
        });
    }

    #[test]
    fn names_are_changed_round() {
        with_device(|netlink, made| {
            let sys = Sysfs::new();
            let mut network = Network::new(sys.path());
            let mut other = LinkMessage::default();
            other.attributes = vec![
                LinkAttribute::IfName("eth0".to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
            ];
            let flags = NLM_F_CREATE | NLM_F_EXCL;
            netlink.change(RouteNetlinkMessage::NewLink(other), flags).unwrap();
            let other = device(netlink, "eth0");
            let (first, second) = (made.index, other.index);
            let mut interfaces = vec![wanted("eth0"), wanted("made")];
            interfaces[1].device = vec![2; 6];
            let state = State { interfaces, ..State::default() };
            let devices = vec![Some(made), Some(other)];
            assert_eq!(network.bring(netlink, state, devices).unwrap(), Vec::<String>::new());
            assert_eq!(device(netlink, "eth0").index, first);
            assert_eq!(device(netlink, "made").index, second);
        });
    }
}
