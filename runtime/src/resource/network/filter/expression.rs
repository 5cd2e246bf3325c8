//! The expressions of a rule: what they match and do, without what is one kernel's own.

use std::collections::HashMap;

use super::attributes::{
    ELEMENT, attribute, attributes, elements, number, only, put, put_nest, put_number, put_text,
    text,
};

/// Names of the interfaces that the guest has too, by their numbers in the namespace.
pub type Interfaces = HashMap<u32, String>;

/// Attributes of an expression (`NFTA_EXPR_*`).
const NAME: u16 = 1;
const DATA: u16 = 2;

/// The loopback device's number, in every namespace.
const LOOPBACK: u32 = 1;
/// Length of an interface's name in a register.
const INTERFACE_NAME: usize = 16;

/// Keys of `meta` (`NFT_META_*`).
const INPUT_INDEX: u32 = 4;
const OUTPUT_INDEX: u32 = 5;
const INPUT_NAME: u32 = 6;
const OUTPUT_NAME: u32 = 7;
const TRANSPORT: u32 = 16;

/// The reason for which an expression cannot be carried into a guest.
pub type Reason = &'static str;
pub const CONTROL_GROUP: Reason = "it names a control group of the host";
pub const IP_SET: Reason = "it uses an IP set (ipset)";

/// An expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    pub name: String,
    pub data: Vec<u8>,
}

impl Expression {
    /// Returns those of a list.
    pub fn list(list: &[u8]) -> Vec<Self> {
        elements(list).filter_map(Self::parse).collect()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let data = attribute(bytes, DATA).unwrap_or_default().to_vec();
        Some(Self { name: text(bytes, NAME)?, data })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_text(&mut bytes, NAME, &self.name);
        put_nest(&mut bytes, DATA, &self.data);
        bytes
    }

    /// Returns the number of a register, if the expression is of that name and loads it with `key`.
    fn loads(&self, name: &str, key: u32) -> Option<u32> {
        // Of `meta`: the register, and what is loaded into it.
        (self.name == name && number(&self.data, 2) == Some(key))
            .then(|| number(&self.data, 1))
            .flatten()
    }

    /// Returns the operation and the value, if the expression compares a register.
    fn compares(&self, register: u32) -> Option<(u32, &[u8])> {
        if self.name != "cmp" || number(&self.data, 1) != Some(register) {
            return None;
        }
        Some((number(&self.data, 2)?, attribute(attribute(&self.data, 3)?, 1)?))
    }

    /// Leaves out what is counted while the rules are at work, and what a kernel lists and does not take.
    fn forget(&mut self) {
        match self.name.as_str() {
            "counter" | "last" => self.data.clear(),
            // All but what is used up.
            "quota" => self.data = only(&self.data, &[1, 2]),
            // Flags are listed, and not taken, where a header is written; where an option is stripped, only its type
            // and the operation are.
            "exthdr" if number(&self.data, 1).is_none() => {
                let kept =
                    if attribute(&self.data, 7).is_some() { &[2, 3, 4, 6, 7][..] } else { &[2, 6] };
                self.data = only(&self.data, kept);
            }
            "dynset" => {
                self.data = without_state(&self.data, 7, 10);
                // A set without timeouts takes none.
                if attribute(&self.data, 6).is_some_and(|time| time.iter().all(|byte| *byte == 0)) {
                    self.data = only(&self.data, &[1, 2, 3, 4, 5, 7, 9, 10]);
                }
            }
            _ => {}
        }
    }

    /// Returns why the expression cannot be carried: it names something of the host's.
    fn reason(&self) -> Option<Reason> {
        let of = text(&self.data, 1).unwrap_or_default();
        match (self.name.as_str(), of.as_str()) {
            ("match", "cgroup") => Some(CONTROL_GROUP),
            // NFT_SOCKET_CGROUPV2
            ("socket", _) if number(&self.data, 1) == Some(3) => Some(CONTROL_GROUP),
            ("match", "set") | ("target", "SET") => Some(IP_SET),
            _ => None,
        }
    }
}

/// Returns a list of expressions as another kernel takes it.
pub fn carry(list: &[u8], interfaces: &Interfaces) -> Result<Vec<u8>, Reason> {
    let mut expressions = Expression::list(list);
    if let Some(reason) = expressions.iter().find_map(Expression::reason) {
        return Err(reason);
    }
    name_interfaces(&mut expressions, interfaces)?;
    expressions.iter_mut().for_each(Expression::forget);
    let mut bytes = Vec::new();
    for expression in &expressions {
        put_nest(&mut bytes, ELEMENT, &expression.to_bytes());
    }
    Ok(bytes)
}

/// Returns attributes of which one is an expression and another a list of them, without what these count.
pub fn without_state(bytes: &[u8], one: u16, list: u16) -> Vec<u8> {
    let mut kept = Vec::with_capacity(bytes.len());
    for (kind, value) in attributes(bytes) {
        let nests = if kind == one {
            Expression::parse(value).into_iter().collect()
        } else if kind == list {
            Expression::list(value)
        } else {
            put(&mut kept, kind, value);
            continue;
        };
        let mut inner = Vec::new();
        for mut expression in nests {
            expression.forget();
            if kind == one {
                inner = expression.to_bytes();
            } else {
                put_nest(&mut inner, ELEMENT, &expression.to_bytes());
            }
        }
        put_nest(&mut kept, kind, &inner);
    }
    kept
}

/// Interfaces have other numbers in the guest, and the same names: a number that is compared becomes a name.
fn name_interfaces(expressions: &mut [Expression], interfaces: &Interfaces) -> Result<(), Reason> {
    const REASON: Reason = "it goes by the number of an interface that the guest does not have";
    for at in 0..expressions.len() {
        let (before, behind) = expressions.split_at_mut(at + 1);
        let (load, compare) = (&mut before[at], behind.first_mut());
        let name = if load.loads("meta", INPUT_INDEX).is_some() {
            Some(INPUT_NAME)
        } else if load.loads("meta", OUTPUT_INDEX).is_some() {
            Some(OUTPUT_NAME)
        } else if load.loads("fib", 1).is_some() {
            // Without a name in its place: compared with none, or with the loopback device.
            None
        } else {
            continue;
        };
        let register = number(&load.data, 1).ok_or(REASON)?;
        let compare = compare.ok_or(REASON)?;
        let (operation, value) = compare.compares(register).ok_or(REASON)?;
        let index = value.try_into().map(u32::from_ne_bytes).map_err(|_| REASON)?;
        if matches!(index, 0 | LOOPBACK) {
            continue;
        }
        // Equal or not; and only these registers have room for a name.
        let (key, text) = match (name, interfaces.get(&index)) {
            (Some(key), Some(text)) if operation <= 1 && (1..=4).contains(&register) => (key, text),
            _ => return Err(REASON),
        };
        let mut name = text.as_bytes().to_vec();
        name.resize(INTERFACE_NAME, 0);
        load.data.clear();
        put_number(&mut load.data, 1, register);
        put_number(&mut load.data, 2, key);
        let mut value = Vec::new();
        put(&mut value, 1, &name);
        compare.data.clear();
        put_number(&mut compare.data, 1, register);
        put_number(&mut compare.data, 2, operation);
        put_nest(&mut compare.data, 3, &value);
    }
    Ok(())
}

/// Returns the protocol that a rule is for, and whether it is for all others: iptables-nft tells it with each
/// rule, because its matches and targets ask for it, and the kernel does not list it.
pub fn protocol(list: &[u8]) -> Option<(u8, bool)> {
    let expressions = Expression::list(list);
    if !expressions.iter().any(|one| matches!(one.name.as_str(), "match" | "target")) {
        return None;
    }
    expressions.windows(2).find_map(|pair| {
        let [load, compare] = pair else { return None };
        // A byte of the network layer's header: `protocol` of IPv4, `next header` of IPv6.
        let is_header = load.name == "payload"
            && number(&load.data, 2) == Some(1)
            && matches!(number(&load.data, 3), Some(6 | 9))
            && number(&load.data, 4) == Some(1);
        let register = match is_header {
            true => number(&load.data, 1),
            false => load.loads("meta", TRANSPORT),
        };
        match compare.compares(register?)? {
            (operation @ (0 | 1), &[protocol]) => Some((protocol, operation == 1)),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An expression of numbers: their attributes, and the numbers.
    fn expression(name: &str, numbers: &[(u16, u32)]) -> Expression {
        let mut data = Vec::new();
        for (kind, value) in numbers {
            put_number(&mut data, *kind, *value);
        }
        Expression { name: name.to_owned(), data }
    }

    fn compare(register: u32, operation: u32, value: &[u8]) -> Expression {
        let mut compare = expression("cmp", &[(1, register), (2, operation)]);
        let mut data = Vec::new();
        put(&mut data, 1, value);
        put_nest(&mut compare.data, 3, &data);
        compare
    }

    fn list(expressions: &[Expression]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for expression in expressions {
            put_nest(&mut bytes, ELEMENT, &expression.to_bytes());
        }
        bytes
    }

    fn named(name: &str, of: &str) -> Expression {
        let mut data = Vec::new();
        put_text(&mut data, 1, of);
        Expression { name: name.to_owned(), data }
    }

    fn carried(expressions: &[Expression]) -> Result<Vec<Expression>, Reason> {
        let interfaces = Interfaces::from([(7, "eth0".to_owned())]);
        carry(&list(expressions), &interfaces).map(|bytes| Expression::list(&bytes))
    }

    #[test]
    fn what_is_counted_is_left_out_at_any_depth() {
        let counter = expression("counter", &[(1, 7), (2, 8)]);
        let mut dynset = expression("dynset", &[(3, 1)]);
        put(&mut dynset.data, 6, &[0; 8]);
        put_nest(&mut dynset.data, 10, &list(std::slice::from_ref(&counter)));
        let quota = expression("quota", &[(1, 9), (4, 3)]);
        let made = carried(&[counter, dynset, quota]).unwrap();
        assert!(made[0].data.is_empty() && attribute(&made[1].data, 6).is_none());
        let inner = Expression::list(attribute(&made[1].data, 10).unwrap());
        assert_eq!(inner, [expression("counter", &[])]);
        assert_eq!(made[2], expression("quota", &[(1, 9)]));
    }

    #[test]
    fn a_compared_number_of_an_interface_becomes_its_name() {
        let load = |key| expression("meta", &[(1, 1), (2, key)]);
        let made = carried(&[load(OUTPUT_INDEX), compare(1, 1, &7_u32.to_ne_bytes())]).unwrap();
        assert_eq!(made[0], load(OUTPUT_NAME));
        assert_eq!(made[1], compare(1, 1, b"eth0\0\0\0\0\0\0\0\0\0\0\0\0"));
        // The loopback device has the same number everywhere.
        let loopback = [load(INPUT_INDEX), compare(1, 0, &1_u32.to_ne_bytes())];
        assert_eq!(carried(&loopback).unwrap(), loopback);
        for (number, operation) in [(8_u32, 0), (7, 4)] {
            let compare = compare(1, operation, &number.to_ne_bytes());
            assert!(carried(&[load(INPUT_INDEX), compare]).is_err(), "{number} {operation}");
        }
        // Looked up in a set, in another register, or at the end.
        assert!(carried(&[load(INPUT_INDEX), expression("lookup", &[(2, 1)])]).is_err());
        assert!(carried(&[load(INPUT_INDEX), compare(2, 0, &7_u32.to_ne_bytes())]).is_err());
        assert!(carried(&[load(INPUT_INDEX)]).is_err());
    }

    #[test]
    fn what_names_something_of_the_hosts_is_refused() {
        assert_eq!(carried(&[named("match", "cgroup")]), Err(CONTROL_GROUP));
        assert_eq!(carried(&[expression("socket", &[(1, 3)])]), Err(CONTROL_GROUP));
        assert_eq!(carried(&[named("match", "set")]), Err(IP_SET));
        assert_eq!(carried(&[named("target", "SET")]), Err(IP_SET));
        assert!(carried(&[named("match", "owner"), expression("socket", &[(1, 0)])]).is_ok());
    }

    #[test]
    fn the_protocol_of_a_rule_is_told_again() {
        let owner = named("match", "owner");
        let header = expression("payload", &[(1, 1), (2, 1), (3, 9), (4, 1)]);
        let of = |rule: &[Expression]| protocol(&list(rule));
        assert_eq!(of(&[header.clone(), compare(1, 0, &[6]), owner.clone()]), Some((6, false)));
        let transport = expression("meta", &[(1, 1), (2, TRANSPORT)]);
        assert_eq!(of(&[transport, compare(1, 1, &[17]), owner.clone()]), Some((17, true)));
        assert_eq!(of(&[owner]), None);
        assert_eq!(of(&[header, compare(1, 0, &[6])]), None);
    }
}
