//! Tables of nftables: from what one kernel lists to the messages that make them in another.
//!
//! What is listed has the shape of what makes it, but for what is the kernel's own: handles, numbers of users,
//! counters, the owner of a table.

use std::io;

use husk_agent_protocols::agent::{NftablesMessage, NftablesTable};

use super::Uncarried;
use super::attributes::{
    ELEMENT, attribute, elements, number, only, put_nest, put_number, put_text, text,
};
use super::expression::{Interfaces, without_state};
use super::netlink::{self, Lists, Message};
use super::rule::{Rule, table_name};

/// The table of everything that is in one.
const TABLE: u16 = 1;

/// Bytes of elements in one message, whose list has a length of 16 bits.
const MOST_ELEMENTS: usize = 32 << 10;

/// A table, and the name of each of its messages for errors.
pub struct Table {
    pub table: NftablesTable,
    pub names: Vec<String>,
}

/// Returns the tables that have an effect on what passes the namespace, but for Docker's rules; and what of
/// them cannot be carried.
pub fn tables(
    lists: &mut Lists,
    interfaces: &Interfaces,
) -> io::Result<(Vec<Table>, Vec<Uncarried>)> {
    let chains = lists.list(netlink::GET_CHAIN, 0, Vec::new())?;
    let rules = lists.list(netlink::GET_RULE, 0, Vec::new())?;
    let rules: Vec<_> =
        rules.iter().filter_map(Rule::parse).filter(|rule| !rule.is_dockers()).collect();
    // Most namespaces have none.
    if rules.is_empty() && !chains.iter().any(drops) {
        return Ok((Vec::new(), Vec::new()));
    }
    let sets = lists.list(netlink::GET_SET, 0, Vec::new())?;
    let objects = lists.list(netlink::GET_OBJECT, 0, Vec::new())?;
    let mut members = Vec::new();
    for set in &sets {
        let request = only(&set.attributes, &[TABLE, 2]);
        members.push(lists.list(netlink::GET_ELEMENTS, set.family, request)?);
    }
    // Last, because there is one at least: if anything has changed meanwhile, this tells.
    let listed = lists.list(netlink::GET_TABLE, 0, Vec::new())?;
    let (mut found, mut uncarried) = (Vec::new(), Vec::new());
    for table in &listed {
        let Some(name) = text(&table.attributes, TABLE) else { continue };
        let of = |one: &Message| {
            one.family == table.family && text(&one.attributes, TABLE).as_ref() == Some(&name)
        };
        let rules: Vec<_> = rules.iter().filter(|rule| of(rule.message)).collect();
        let policies = chains.iter().filter(|chain| of(chain) && drops(chain));
        let dormant = number(&table.attributes, 2).is_some_and(|flags| flags & DORMANT != 0);
        let first = rules.first().map(|rule| rule.name()).or(policies.map(policy_name).next());
        let Some(first) = first.filter(|_| !dormant) else { continue };
        if i32::from(table.family) == libc::NFPROTO_BRIDGE {
            let reason = "the guest does not have the ports of the namespace's bridges".to_owned();
            uncarried.push(Uncarried { what: first, reason });
            continue;
        }
        let mut making = Making::new(table, &name);
        making.add_all(netlink::NEW_CHAIN, chains.iter().filter(|one| of(one)).map(chain));
        let (sets, members): (Vec<_>, Vec<_>) =
            sets.iter().zip(&members).filter(|(set, _)| of(set)).unzip();
        making.add_all(netlink::NEW_SET, sets.iter().zip(1..).map(|(one, id)| set(one, id)));
        making.add_all(netlink::NEW_OBJECT, objects.iter().filter(|one| of(one)).map(object));
        let filled = sets.iter().zip(members).flat_map(|(set, all)| set_elements(set, all));
        making.add_all(netlink::NEW_ELEMENTS, filled);
        match making.add_rules(&rules, interfaces) {
            Ok(()) => found.push(making.table),
            Err(one) => uncarried.push(one),
        }
    }
    Ok((found, uncarried))
}

/// `NFT_TABLE_F_DORMANT`, and the bit of an anonymous chain (`NFT_CHAIN_BINDING`).
const DORMANT: u32 = 1;
const BINDING: u32 = 4;

/// Returns whether it is the policy of a chain to drop, which needs no rule for it.
fn drops(chain: &Message) -> bool {
    number(&chain.attributes, 5) == Some(0)
}

fn policy_name(chain: &Message) -> String {
    let name = |kind| text(&chain.attributes, kind).unwrap_or_default();
    format!("policy drop of chain {} in {}", name(3), table_name(chain.family, &name(TABLE)))
}

/// Attributes, and the name of what they make.
type Made = (Vec<u8>, String);

/// A table as it comes about.
struct Making {
    table: Table,
    whole_name: String,
}

impl Making {
    fn new(listed: &Message, name: &str) -> Self {
        let mut attributes = only(&listed.attributes, &[1, 6]);
        put_number(&mut attributes, 2, 0);
        let table = NftablesTable {
            family: listed.family.into(),
            name: name.to_owned(),
            ..NftablesTable::default()
        };
        let whole_name = table_name(listed.family, name);
        let mut making = Self { table: Table { table, names: Vec::new() }, whole_name };
        making.add(netlink::NEW_TABLE, attributes, making.whole_name.clone());
        making
    }

    fn add(&mut self, kind: u16, attributes: Vec<u8>, name: String) {
        let kind = kind.into();
        let message = NftablesMessage { kind, attributes, ..NftablesMessage::default() };
        self.table.table.messages.push(message);
        self.table.names.push(name);
    }

    fn add_all(&mut self, kind: u16, made: impl Iterator<Item = Made>) {
        for (attributes, name) in made {
            let name = format!("{name} in {}", self.whole_name);
            self.add(kind, attributes, name);
        }
    }

    fn add_rules(&mut self, rules: &[&Rule<'_>], interfaces: &Interfaces) -> Result<(), Uncarried> {
        for rule in rules {
            let carried = rule
                .carried(interfaces)
                .map_err(|reason| Uncarried { what: rule.name(), reason: reason.to_owned() })?;
            self.add(netlink::NEW_RULE, carried, rule.name());
        }
        Ok(())
    }
}

/// Name, hook, policy, type and comment. An anonymous chain becomes one with its name: rules can be added to
/// that in any order.
fn chain(listed: &Message) -> Made {
    let bytes = &listed.attributes;
    let mut made = only(bytes, &[TABLE, 3, 4, 5, 7, 12]);
    if let Some(flags) = number(bytes, 10).map(|all| all & !BINDING).filter(|flags| *flags != 0) {
        put_number(&mut made, 10, flags);
    }
    (made, format!("chain {}", text(bytes, 3).unwrap_or_default()))
}

fn set(listed: &Message, id: u32) -> Made {
    let bytes = &listed.attributes;
    let kept = [TABLE, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18];
    let mut made = without_state(&only(bytes, &kept), 17, 18);
    put_number(&mut made, 10, id);
    (made, format!("set {}", text(bytes, 2).unwrap_or_default()))
}

/// A named counter begins at nothing, and of a quota nothing is used up.
fn object(listed: &Message) -> Made {
    let bytes = &listed.attributes;
    let data = attribute(bytes, 4).unwrap_or_default();
    let data = match number(bytes, 3) {
        Some(1) => Vec::new(),
        Some(2) => only(data, &[1, 2]),
        _ => data.to_vec(),
    };
    let mut made = only(bytes, &[TABLE, 2, 3, 8]);
    put_nest(&mut made, 4, &data);
    (made, format!("object {}", text(bytes, 2).unwrap_or_default()))
}

/// Returns the elements of a set in as many messages as they need.
fn set_elements(set: &Message, listed: &[Message]) -> Vec<Made> {
    let name = text(&set.attributes, 2).unwrap_or_default();
    let lists = listed.iter().filter_map(|message| attribute(&message.attributes, 3));
    let mut all: Vec<_> = lists.flat_map(elements).collect();
    // They are listed in any order. The kernel takes the ends of intervals in ascending order only.
    all.sort_by_key(|element| {
        let key = attribute(element, 1).and_then(|key| attribute(key, 1));
        let is_end = number(element, 3).is_some_and(|flags| flags & 1 != 0);
        (key, !is_end)
    });
    let mut made = Vec::new();
    let mut list = Vec::new();
    let mut finish = |list: &mut Vec<u8>| {
        let mut attributes = only(&set.attributes, &[TABLE]);
        put_text(&mut attributes, 2, &name);
        put_nest(&mut attributes, 3, list);
        list.clear();
        made.push((attributes, format!("elements of set {name}")));
    };
    for element in all {
        // Without when it expires: its time begins anew.
        let kept = only(element, &[1, 2, 3, 4, 6, 7, 9, 10, 11]);
        put_nest(&mut list, ELEMENT, &without_state(&kept, 7, 11));
        if list.len() > MOST_ELEMENTS {
            finish(&mut list);
        }
    }
    if !list.is_empty() {
        finish(&mut list);
    }
    made
}
