//! From what a namespace holds to what the guest is told.
//!
//! Only attributes that another kernel can take are told; what it makes by itself (the routes of
//! an address, the rules of every namespace) is not.

use std::collections::HashMap;

use husk_agent_protocols::agent::{Interface as GuestInterface, NetworkState};
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};

use super::{Found, Interface};

/// What stands for the loopback device; the first interface is the next.
pub const LOOPBACK: u32 = 1;

/// The table of the host's own addresses, which the kernel keeps (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u8 = 255;

/// Of the kernel's own rules, in every namespace: local, main, default.
const STANDING_RULES: [u32; 3] = [0, 32766, 32767];

/// Addresses the guest adds without looking whether another has them: the namespace's kernel has.
const ADDRESS_FLAGS: AddressFlags = AddressFlags::Noprefixroute.union(AddressFlags::Permanent);

/// From the namespace's numbers of interfaces to the guest's.
type Numbers = HashMap<u32, u32>;

impl Found {
    /// What the guest is to have, of the interfaces carried by a device. A device is told by the
    /// hardware address it was made with.
    pub fn state(&self, carried: &[(&Interface, [u8; 6])]) -> NetworkState {
        let mut numbers = Numbers::from([(1, LOOPBACK)]);
        let mut state = NetworkState::new();
        for ((interface, device), number) in carried.iter().zip(LOOPBACK + 1..) {
            numbers.insert(interface.index, number);
            let mut one = GuestInterface::new();
            one.device = device.to_vec();
            one.name.clone_from(&interface.name);
            one.address = interface.address.to_vec();
            one.mtu = interface.mtu;
            one.down = !interface.up;
            state.interfaces.push(one);
        }
        state.addresses = self.addresses.iter().filter_map(|one| address(one, &numbers)).collect();
        state.routes = self.routes.iter().filter_map(|one| route(one, &numbers)).collect();
        state.neighbours =
            self.neighbours.iter().filter_map(|one| neighbour(one, &numbers)).collect();
        state.rules = self.rules.iter().filter_map(rule).collect();
        state
    }
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn address(message: &AddressMessage, numbers: &Numbers) -> Option<Vec<u8>> {
    let mut message = message.clone();
    message.header.index = *numbers.get(&message.header.index)?;
    if message.header.index == LOOPBACK {
        return None;
    }
    let mut flags = AddressFlags::empty();
    message.attributes.retain_mut(|attribute| match attribute {
        AddressAttribute::Flags(all) => {
            flags = *all & ADDRESS_FLAGS;
            false
        }
        AddressAttribute::Address(_)
        | AddressAttribute::Local(_)
        | AddressAttribute::Label(_)
        | AddressAttribute::Broadcast(_)
        | AddressAttribute::Anycast(_)
        | AddressAttribute::RoutePriority(_) => true,
        _ => false,
    });
    if message.header.family == AddressFamily::Inet6 {
        flags |= AddressFlags::Nodad;
    }
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.push(AddressAttribute::Flags(flags));
    Some(bytes(&message))
}

fn route(message: &RouteMessage, numbers: &Numbers) -> Option<Vec<u8>> {
    let mut message = message.clone();
    let through_device = match message.header.kind {
        // Of tables of their own, local routes are for transparent proxies.
        RouteType::Unicast | RouteType::Local => true,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            false
        }
        _ => return None,
    };
    // Those that the guest's kernel makes, or hears of, by itself.
    if matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra)
        || message.header.table == LOCAL_TABLE
    {
        return None;
    }
    message.header.flags &= RouteFlags::Onlink;
    let mut reachable = true;
    let mut has_device = false;
    message.attributes.retain_mut(|attribute| match attribute {
        RouteAttribute::Oif(index) => {
            has_device = true;
            let number = numbers.get(index);
            reachable &= number.is_some() || !through_device;
            *index = number.copied().unwrap_or(LOOPBACK);
            through_device
        }
        RouteAttribute::MultiPath(hops) => {
            has_device = true;
            hops.retain_mut(|hop| {
                hop.flags &= RouteNextHopFlags::Onlink;
                let number = numbers.get(&hop.interface_index).copied();
                hop.interface_index = number.unwrap_or(LOOPBACK);
                number.is_some()
            });
            !hops.is_empty()
        }
        RouteAttribute::Destination(_)
        | RouteAttribute::Source(_)
        | RouteAttribute::Gateway(_)
        | RouteAttribute::Via(_)
        | RouteAttribute::PrefSource(_)
        | RouteAttribute::Priority(_)
        | RouteAttribute::Metrics(_)
        | RouteAttribute::Table(_)
        | RouteAttribute::Preference(_) => true,
        _ => false,
    });
    (reachable && (has_device || !through_device)).then(|| bytes(&message))
}

fn neighbour(message: &NeighbourMessage, numbers: &Numbers) -> Option<Vec<u8>> {
    let ours = matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6)
        && message.header.state == NeighbourState::Permanent;
    let mut message = message.clone();
    message.header.ifindex = *numbers.get(&message.header.ifindex).filter(|_| ours)?;
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    (message.header.ifindex != LOOPBACK).then(|| bytes(&message))
}

fn rule(message: &RuleMessage) -> Option<Vec<u8>> {
    let priority = message.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    // A rule without one has priority 0.
    if STANDING_RULES.contains(&priority.unwrap_or(0)) {
        return None;
    }
    let mut message = message.clone();
    message.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Other(_)));
    Some(bytes(&message))
}
