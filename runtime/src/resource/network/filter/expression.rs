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

/// Why an expression cannot be carried into a guest.
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
