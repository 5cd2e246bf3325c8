//! What is in a network namespace, as far as a guest is to have it.

use std::collections::HashMap;

use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleMessage;

use super::is_tap_name;

/// What a namespace holds.
#[derive(Debug)]
pub struct Found {
    /// Interfaces that the guest can have. One that has none yet gets one that is ready; what it has, it keeps
    /// for as long as the interface is there.
    pub interfaces: Vec<Interface>,
    /// Interfaces with an address that it cannot have, and why.
    pub skipped: Vec<(String, &'static str)>,
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) routes: Vec<RouteMessage>,
    pub(super) neighbours: Vec<NeighbourMessage>,
    pub(super) rules: Vec<RuleMessage>,
}

/// An interface of the namespace's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub address: [u8; 6],
    /// Bytes of its largest packet.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it has an address.
    pub has_address: bool,
}

impl Interface {
    /// Whether it is laid out: one that is down, or has no address yet, is looked at again when that changes.
    pub fn is_ready(&self) -> bool {
        self.up && self.has_address
    }
}

impl Found {
    pub(super) fn of(
        links: &[LinkMessage],
        addresses: Vec<AddressMessage>,
        routes: Vec<RouteMessage>,
        neighbours: Vec<NeighbourMessage>,
        rules: Vec<RuleMessage>,
    ) -> Self {
        let mut interfaces = Vec::new();
        let mut skipped = Vec::new();
        for link in links {
            let has_address = addresses.iter().any(|one| {
                one.header.index == link.header.index
                    && one.attributes.iter().any(|a| matches!(a, AddressAttribute::Address(_)))
            });
            let name = name(link).unwrap_or_default();
            let up = link.header.flags.contains(LinkFlags::Up);
            if link.header.flags.contains(LinkFlags::Loopback) || is_tap_name(name) {
                continue;
            }
            match interface(link, name) {
                Ok(interface) => interfaces.push(Interface { up, has_address, ..interface }),
                Err(why) if up && has_address => skipped.push((name.to_owned(), why)),
                Err(_) => {}
            }
        }
        Self { interfaces, skipped, addresses, routes, neighbours, rules }
    }
}

impl Found {
    /// Returns the names of the interfaces that the guest has too.
    pub fn names(&self) -> HashMap<u32, String> {
        let all = self.interfaces.iter().map(|one| (one.index, one.name.clone()));
        all.collect()
    }
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn interface(link: &LinkMessage, name: &str) -> Result<Interface, &'static str> {
    if link.header.link_layer_type != LinkLayerType::Ether {
        return Err("it does not carry Ethernet frames (as a tun, a tunnel or InfiniBand)");
    }
    let address = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    let address = address.ok_or("it has no hardware address")?;
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let mtu = mtu.ok_or("it tells no MTU")?;
    let (index, name) = (link.header.index, name.to_owned());
    Ok(Interface { index, name, address, mtu, up: false, has_address: false })
}
