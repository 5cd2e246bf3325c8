//! Packet filter rules in a namespace, which the guest's packets pass by.
//!
//! Frames go between an interface and its tap below the namespace's own IP stack, so no rule of nftables or
//! iptables there sees them: what a service mesh redirects would silently go straight out. The rules are
//! listed by nfnetlink (nftables, and iptables over it) and by the older tables' socket options
//! ([`super::xtables`]), and named, for an error.
//!
//! Rules for 127.0.0.11 only do not count: Docker's for its name server, which the shim asks itself.

use std::io;

use husk_agent_protocols::resolver::ADDRESS;
use rtnetlink::sys::Socket;

use super::{Namespace, NetworkError, xtables};

/// Linux's numbers: the protocol of netfilter's netlink, its subsystem nftables, and messages of that.
const NETLINK_NETFILTER: isize = 12;
const NFTABLES: u16 = 10 << 8;
const GET_CHAIN: u16 = NFTABLES | 4;
const NEW_CHAIN: u16 = NFTABLES | 3;
const GET_RULE: u16 = NFTABLES | 7;
const NEW_RULE: u16 = NFTABLES | 6;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST_DUMP: u16 = 0x301;

/// Lengths of the headers: of netlink's messages, and of netfilter's behind them.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// More messages than any ruleset has that a person wrote, in bytes.
const MOST: usize = 32 << 20;

impl Namespace {
    /// Returns the names of the rules in the namespace that would have an effect on what passes its IP stack.
    pub fn rules(&self) -> Result<Vec<String>, NetworkError> {
        self.within(rules).map_err(NetworkError::Rules)
    }
}

fn rules() -> io::Result<Vec<String>> {
    let mut rules = Vec::new();
    for (request, answer) in [(GET_CHAIN, NEW_CHAIN), (GET_RULE, NEW_RULE)] {
        for message in dump(request, answer)? {
            rules.extend(if answer == NEW_CHAIN {
                dropping(&message)
            } else {
                Rule::parse(&message).filter(|rule| !rule.is_dockers()).map(|it| it.name())
            });
        }
    }
    rules.extend(xtables::rules()?);
    Ok(rules)
}

/// Returns the payloads, from netfilter's header on, of the messages `answer` that the kernel has for `request`.
/// A kernel without nftables has none.
fn dump(request: u16, answer: u16) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        other => other?,
    };
    socket.bind_auto()?;
    let mut message = Vec::new();
    message.extend(u32::try_from(HEADER + FAMILY_HEADER).unwrap_or_default().to_ne_bytes());
    message.extend(request.to_ne_bytes());
    message.extend(REQUEST_DUMP.to_ne_bytes());
    message.extend([0; 8]); // sequence and port: one request, one socket
    message.extend([0; FAMILY_HEADER]); // every family
    socket.send(&message, 0)?;
    let (mut found, mut length) = (Vec::new(), 0);
    while length < MOST {
        let (packet, _) = socket.recv_from_full()?;
        length += packet.len().max(HEADER);
        for (kind, payload) in messages(&packet) {
            match kind {
                DONE => return Ok(found),
                ERROR => {
                    let code =
                        word(payload).map_or(libc::EIO, |code| code.cast_signed().wrapping_neg());
                    return match code {
                        // No nftables in this kernel.
                        libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT | libc::EPROTONOSUPPORT => {
                            Ok(Vec::new())
                        }
                        // The rules change while they are listed: what is heard is worth a look.
                        code => Err(io::Error::from_raw_os_error(code)),
                    };
                }
                kind if kind == answer => found.push(payload.to_vec()),
                _ => {}
            }
        }
    }
    Err(io::Error::other("there are too many packet filter rules"))
}

/// The messages of a packet: their types and payloads.
fn messages(mut packet: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(word(packet)?).ok()?;
        let kind = u16::from_ne_bytes(packet.get(4..6)?.try_into().ok()?);
        let payload = packet.get(HEADER..length)?;
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The attributes of a message or a nest: their types, without flags, and values.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// A number of nftables' own: in network order.
fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = attribute(bytes, kind)?;
    Some(String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned())
}

/// The name of a table, as `nft list ruleset` shows it.
fn table(family: u8, name: &str) -> String {
    let family = match i32::from(family) {
        libc::NFPROTO_INET => "inet",
        libc::NFPROTO_IPV4 => "ip",
        libc::NFPROTO_ARP => "arp",
        libc::NFPROTO_NETDEV => "netdev",
        libc::NFPROTO_BRIDGE => "bridge",
        libc::NFPROTO_IPV6 => "ip6",
        _ => "unknown",
    };
    format!("table {family} {name}")
}

/// The name of a chain whose policy it is to drop, which needs no rule for it.
fn dropping(message: &[u8]) -> Option<String> {
    let attributes = message.get(FAMILY_HEADER..)?;
    if number(attributes, 5)? != 0 {
        return None;
    }
    let table = table(message[0], &text(attributes, 1)?);
    Some(format!("policy drop of chain {} in {table}", text(attributes, 3)?))
}

/// A rule of nftables, of which iptables-nft makes its own too.
struct Rule {
    table: String,
    chain: String,
    handle: u64,
    /// Names of the expressions, and their data.
    expressions: Vec<(String, Vec<u8>)>,
}

impl Rule {
    fn parse(message: &[u8]) -> Option<Self> {
        let attributes_of = message.get(FAMILY_HEADER..)?;
        let list = attribute(attributes_of, 4).unwrap_or_default();
        let expression = |(_, element): (u16, &[u8])| {
            Some((text(element, 1)?, attribute(element, 2).unwrap_or_default().to_vec()))
        };
        Some(Self {
            table: table(message[0], &text(attributes_of, 1)?),
            chain: text(attributes_of, 2)?,
            handle: attribute(attributes_of, 3)
                .and_then(|value| value.try_into().ok())
                .map_or(0, u64::from_be_bytes),
            expressions: attributes(list).filter_map(expression).collect(),
        })
    }

    /// As `nft -a list ruleset` numbers it; with what it does, as far as its last expression says.
    fn name(&self) -> String {
        let last = self.expressions.last();
        let does = match last {
            Some((name, data)) if name == "target" => text(data, 1).unwrap_or_default(),
            Some((name, data)) if name == "immediate" => verdict(data).unwrap_or_default(),
            Some((name, _)) => name.clone(),
            None => String::new(),
        };
        let does = if does.is_empty() { does } else { format!(" ({does})") };
        format!("rule{does} with handle {} of chain {} in {}", self.handle, self.chain, self.table)
    }

    /// Whether it is for packets from or to Docker's name server only: an address is loaded from the header
    /// of the network layer, and compared.
    fn is_dockers(&self) -> bool {
        self.expressions.windows(2).any(|pair| {
            let [(load, place), (compare, value)] = pair else { return false };
            let source_or_destination = matches!(number(place, 3), Some(12 | 16));
            load == "payload"
                && number(place, 2) == Some(1)
                && source_or_destination
                && number(place, 4) == Some(4)
                && compare == "cmp"
                && number(value, 2) == Some(0)
                && attribute(value, 3).and_then(|data| attribute(data, 1))
                    == Some(&ADDRESS.octets()[..])
        })
    }
}

/// Where a rule sends packets: a verdict, and the chain that it names.
fn verdict(data: &[u8]) -> Option<String> {
    let verdict = attribute(attribute(data, 2)?, 2)?;
    let name = match number(verdict, 1)?.cast_signed() {
        0 => "drop",
        1 => "accept",
        3 => "queue",
        -3 => "jump",
        -4 => "goto",
        -5 => "return",
        _ => "continue",
    };
    let chain = text(verdict, 2).map(|chain| format!(" {chain}")).unwrap_or_default();
    Some(format!("{name}{chain}"))
}
