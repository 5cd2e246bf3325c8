//! From the host's messages to the guest's kernel: addresses, routes, neighbours and rules.

use std::collections::HashMap;
use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NlasIterator, Parseable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressMessage, AddressMessageBuffer};
use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourMessageBuffer};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMessageBuffer};
use netlink_packet_route::rule::{RuleMessage, RuleMessageBuffer};

use super::netlink::Netlink;

// The parser takes for granted that some attributes are as long as they should be, and panics.

/// `IFA_CACHEINFO`, and bytes of `struct ifa_cacheinfo`.
const CACHE_INFO: u16 = 6;
const CACHE_INFO_SIZE: usize = 16;

/// `RTA_MULTIPATH`, bytes of `struct rtnexthop`, and `RTA_ENCAP`.
const MULTIPATH: u16 = 9;
const HOP: usize = 8;
const ENCAPSULATION: u16 = 22;

/// `RTA_FLOW` and `FRA_FLOW`.
const FLOW: u16 = 11;

/// From the positions that the host tells to the numbers of the guest's interfaces.
pub type Numbers = HashMap<u32, u32>;

/// The kinds of message that a state holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Address,
    Route,
    Neighbour,
    Rule,
}

impl Kind {
    /// In the order in which they need one another.
    pub const ALL: [Self; 4] = [Self::Address, Self::Route, Self::Neighbour, Self::Rule];

    /// For messages to the host.
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Route => "route",
            Self::Neighbour => "neighbour",
            Self::Rule => "rule",
        }
    }
}

/// Adds what `message` says; what is there already is right.
pub fn add(netlink: &mut Netlink, kind: Kind, message: &[u8], numbers: &Numbers) -> io::Result<()> {
    use RouteNetlinkMessage::{NewAddress, NewNeighbour, NewRoute, NewRule};
    let (message, flags) = match kind {
        Kind::Address => (NewAddress(address(message, numbers)?), NLM_F_REPLACE),
        // Appended rather than replaced: an IPv6 route may have several ways of one metric.
        Kind::Route => (NewRoute(route(message, numbers)?), NLM_F_EXCL),
        Kind::Neighbour => (NewNeighbour(neighbour(message, numbers)?), NLM_F_REPLACE),
        Kind::Rule => (NewRule(rule(message)?), NLM_F_EXCL),
    };
    match netlink.change(message, NLM_F_CREATE | flags) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        done => done,
    }
}

/// Takes away what `message` says; what has gone is right.
pub fn remove(
    netlink: &mut Netlink,
    kind: Kind,
    message: &[u8],
    numbers: &Numbers,
) -> io::Result<()> {
    use RouteNetlinkMessage::{DelAddress, DelNeighbour, DelRoute, DelRule};
    let message = match kind {
        Kind::Address => DelAddress(address(message, numbers)?),
        Kind::Route => DelRoute(route(message, numbers)?),
        Kind::Neighbour => DelNeighbour(neighbour(message, numbers)?),
        Kind::Rule => DelRule(rule(message)?),
    };
    match netlink.change(message, 0) {
        Err(error) if gone(&error) => Ok(()),
        done => done,
    }
}

/// Whether `message` is understood, and names interfaces that there are.
pub fn check(kind: Kind, message: &[u8], numbers: &Numbers) -> io::Result<()> {
    match kind {
        Kind::Address => address(message, numbers).map(drop),
        Kind::Route => route(message, numbers).map(drop),
        Kind::Neighbour => neighbour(message, numbers).map(drop),
        Kind::Rule => rule(message).map(drop),
    }
}

fn gone(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENODEV];
    error.raw_os_error().is_some_and(|code| gone.contains(&code))
}

fn number(position: u32, numbers: &Numbers) -> io::Result<u32> {
    let unknown = || io::Error::other(format!("there is no interface {position} in the state"));
    numbers.get(&position).copied().ok_or_else(unknown)
}

/// Whether one of the attributes in `bytes` is `such`, by its kind and its value. What is no attribute
/// is the parser's to refuse.
fn any_attribute(bytes: &[u8], such: impl Fn(u16, &[u8]) -> bool) -> bool {
    NlasIterator::new(bytes).map_while(Result::ok).any(|one| such(one.kind(), one.value()))
}

fn address(bytes: &[u8], numbers: &Numbers) -> io::Result<AddressMessage> {
    let buffer = AddressMessageBuffer::new_checked(&bytes).map_err(io::Error::other)?;
    let short = |kind, value: &[u8]| kind == CACHE_INFO && value.len() < CACHE_INFO_SIZE;
    if any_attribute(buffer.payload(), short) {
        return Err(io::Error::other("an address with times that are not whole"));
    }
    let mut message = AddressMessage::parse(&buffer).map_err(io::Error::other)?;
    message.header.index = number(message.header.index, numbers)?;
    Ok(message)
}

fn route(bytes: &[u8], numbers: &Numbers) -> io::Result<RouteMessage> {
    let buffer = RouteMessageBuffer::new_checked(&bytes).map_err(io::Error::other)?;
    if any_attribute(buffer.payload(), is_odd) {
        return Err(io::Error::other(
            "a route into a tunnel, or with attributes that are not whole",
        ));
    }
    let mut message = RouteMessage::parse(&buffer).map_err(io::Error::other)?;
    for attribute in &mut message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => *index = number(*index, numbers)?,
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    hop.interface_index = number(hop.interface_index, numbers)?;
                }
            }
            _ => {}
        }
    }
    Ok(message)
}

/// Whether an attribute of a route, or of one of its ways, cannot be left to the parser. The guest's
/// kernel has no tunnels, so nothing is lost with those.
fn is_odd(kind: u16, value: &[u8]) -> bool {
    match kind {
        ENCAPSULATION => true,
        FLOW => is_short_flow(kind, value),
        MULTIPATH => {
            let mut rest = value;
            while let Some(&[low, high]) = rest.get(..2) {
                let length = usize::from(u16::from_ne_bytes([low, high]));
                let Some(inner) = rest.get(HOP..length) else { return true };
                if any_attribute(inner, |kind, value| kind == MULTIPATH || is_odd(kind, value)) {
                    return true;
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
            false
        }
        _ => false,
    }
}

fn is_short_flow(kind: u16, value: &[u8]) -> bool {
    kind == FLOW && value.len() < size_of::<u32>()
}

fn neighbour(bytes: &[u8], numbers: &Numbers) -> io::Result<NeighbourMessage> {
    let buffer = NeighbourMessageBuffer::new_checked(&bytes).map_err(io::Error::other)?;
    let mut message = NeighbourMessage::parse(&buffer).map_err(io::Error::other)?;
    message.header.ifindex = number(message.header.ifindex, numbers)?;
    Ok(message)
}

/// Rules name interfaces.
fn rule(bytes: &[u8]) -> io::Result<RuleMessage> {
    let buffer = RuleMessageBuffer::new_checked(&bytes).map_err(io::Error::other)?;
    if any_attribute(buffer.payload(), is_short_flow) {
        return Err(io::Error::other("a rule with a realm that is not whole"));
    }
    RuleMessage::parse(&buffer).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).expect("short");
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn attributes_that_the_parser_would_stumble_over_are_refused() {
        let numbers = Numbers::from([(2, 7)]);
        let address =
            |times: &[u8]| [&[2, 24, 0, 0, 2, 0, 0, 0][..], &attribute(CACHE_INFO, times)].concat();
        assert!(check(Kind::Address, &address(&[0; 16]), &numbers).is_ok());
        assert!(check(Kind::Address, &address(&[0; 5]), &numbers).is_err());
        let route = |more: &[u8]| [&[2, 0, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0][..], more].concat();
        // LWTUNNEL_ENCAP_SEG6, with a header that is not there.
        let tunnel =
            [attribute(21, &[5, 0]), attribute(ENCAPSULATION, &attribute(1, &[0]))].concat();
        assert!(check(Kind::Route, &route(&attribute(4, &[1, 0, 0, 0])), &numbers).is_err());
        assert!(check(Kind::Route, &route(&attribute(4, &[2, 0, 0, 0])), &numbers).is_ok());
        assert!(check(Kind::Route, &route(&tunnel), &numbers).is_err());
        assert!(check(Kind::Route, &route(&attribute(FLOW, &[0; 4])), &numbers).is_ok());
        assert!(check(Kind::Route, &route(&attribute(FLOW, &[])), &numbers).is_err());
        let rule = |more: &[u8]| [&[2, 0, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0][..], more].concat();
        assert!(check(Kind::Rule, &rule(&attribute(FLOW, &[0; 4])), &numbers).is_ok());
        assert!(check(Kind::Rule, &rule(&attribute(FLOW, &[0; 2])), &numbers).is_err());
        let length = u8::try_from(HOP + tunnel.len()).expect("short");
        let way = [&[length, 0, 0, 0, 2, 0, 0, 0][..], &tunnel].concat();
        let ways = [&[8, 0, 0, 0, 2, 0, 0, 0][..], &way].concat();
        assert!(check(Kind::Route, &route(&attribute(MULTIPATH, &ways)), &numbers).is_err());
        assert!(check(Kind::Route, &route(&attribute(MULTIPATH, &ways[..8])), &numbers).is_ok());
        let short = [7, 0, 0, 0, 2, 0, 0, 0];
        assert!(check(Kind::Route, &route(&attribute(MULTIPATH, &short)), &numbers).is_err());
    }
}
