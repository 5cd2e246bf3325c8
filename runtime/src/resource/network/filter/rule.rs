//! A rule of nftables, of which iptables-nft makes its own too: for whom, named for an error, and as another
//! kernel takes it.

use husk_agent_protocols::resolver::ADDRESS;

use super::attributes::{attribute, number, put, put_nest, put_number, text};
use super::expression::{Expression, Interfaces, Reason, carry, protocol};
use super::netlink::Message;

/// Attributes of a rule (`NFTA_RULE_*`).
const TABLE: u16 = 1;
const CHAIN: u16 = 2;
const HANDLE: u16 = 3;
const EXPRESSIONS: u16 = 4;
const COMPATIBILITY: u16 = 5;
const USER_DATA: u16 = 7;

/// `NFT_RULE_COMPAT_F_INV`
const INVERTED: u32 = 2;

/// Returns a table's name, as `nft list ruleset` shows it.
pub fn table_name(family: u8, name: &str) -> String {
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

/// A rule.
pub struct Rule<'a> {
    pub message: &'a Message,
    pub table: String,
    chain: String,
    handle: u64,
    expressions: Vec<Expression>,
}

impl<'a> Rule<'a> {
    pub fn parse(message: &'a Message) -> Option<Self> {
        let bytes = &message.attributes;
        Some(Self {
            message,
            table: text(bytes, TABLE)?,
            chain: text(bytes, CHAIN)?,
            handle: attribute(bytes, HANDLE)
                .and_then(|value| value.try_into().ok())
                .map_or(0, u64::from_be_bytes),
            expressions: Expression::list(attribute(bytes, EXPRESSIONS).unwrap_or_default()),
        })
    }

    /// Returns the rule as `nft -a list ruleset` numbers it; with what it does, as far as its last expression
    /// says.
    pub fn name(&self) -> String {
        let last = self.expressions.last();
        let does = match last {
            Some(Expression { name, data }) if name == "target" => {
                text(data, 1).unwrap_or_default()
            }
            Some(Expression { name, data }) if name == "immediate" => {
                verdict(data).unwrap_or_default()
            }
            Some(Expression { name, .. }) => name.clone(),
            None => String::new(),
        };
        let does = if does.is_empty() { does } else { format!(" ({does})") };
        let table = table_name(self.message.family, &self.table);
        format!("rule{does} with handle {} of chain {} in {table}", self.handle, self.chain)
    }

    /// Returns whether the rule is for packets from or to Docker's name server only: an address is loaded from
    /// the header of the network layer, and compared.
    pub fn is_dockers(&self) -> bool {
        self.expressions.windows(2).any(|pair| {
            let [load, compare] = pair else { return false };
            let source_or_destination = matches!(number(&load.data, 3), Some(12 | 16));
            load.name == "payload"
                && number(&load.data, 2) == Some(1)
                && source_or_destination
                && number(&load.data, 4) == Some(4)
                && compare.name == "cmp"
                && number(&compare.data, 2) == Some(0)
                && attribute(&compare.data, 3).and_then(|data| attribute(data, 1))
                    == Some(&ADDRESS.octets()[..])
        })
    }

    /// Returns the attributes that make the rule in another kernel.
    pub fn carried(&self, interfaces: &Interfaces) -> Result<Vec<u8>, Reason> {
        let bytes = &self.message.attributes;
        let list = attribute(bytes, EXPRESSIONS).unwrap_or_default();
        let mut made = Vec::with_capacity(bytes.len());
        for kind in [TABLE, CHAIN] {
            put(&mut made, kind, attribute(bytes, kind).unwrap_or_default());
        }
        put_nest(&mut made, EXPRESSIONS, &carry(list, interfaces)?);
        if let Some((protocol, inverted)) = protocol(list) {
            let mut compatibility = Vec::new();
            put_number(&mut compatibility, 1, protocol.into());
            put_number(&mut compatibility, 2, if inverted { INVERTED } else { 0 });
            put_nest(&mut made, COMPATIBILITY, &compatibility);
        }
        if let Some(comment) = attribute(bytes, USER_DATA) {
            put(&mut made, USER_DATA, comment);
        }
        Ok(made)
    }
}

/// Returns where a rule sends packets: a verdict, and the chain that it names.
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
