//! Packet filter rules in a namespace, which the guest carries out.
//!
//! Frames go between an interface and its tap below the namespace's own IP stack, so no rule of nftables or
//! iptables there sees them: what a service mesh redirects would silently go straight out. So the tables are
//! listed ([`nftables`], and [`xtables`] for the older iptables) and told to the guest, whose kernel makes the
//! same of them. What it cannot have the same of is named, for an error.
//!
//! Rules for 127.0.0.11 only do not count: Docker's for its name server, which the shim asks itself.

mod attributes;
mod expression;
mod netlink;
mod nftables;
mod rule;
#[cfg(test)]
mod tests;
mod watch;
mod xtables;

use std::io;

use husk_agent_protocols::agent::{FilterRefusal, NftablesTable, XtablesTable};

use self::netlink::Lists;
use super::{Namespace, NetworkError};
pub use expression::Interfaces;
pub use watch::Watch;

/// How often the rules are listed again because they have changed meanwhile.
const TRIES: usize = 8;

/// Bytes of rules that a guest is told at most: a call to it has room for 4 MiB.
const MOST: usize = 2 << 20;

/// A rule that cannot be carried out in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uncarried {
    /// The rule, or what else there is in a table, with the names of its chain and table.
    pub what: String,
    /// The reason.
    pub reason: String,
}

/// The packet filter of a namespace, as far as it has an effect on what passes.
#[derive(Debug, Default)]
pub struct Filter {
    /// Tables of nftables for the guest.
    pub nftables: Vec<NftablesTable>,
    /// Tables of the older iptables for the guest.
    pub xtables: Vec<XtablesTable>,
    /// Rules that cannot be carried; their tables are left out.
    pub uncarried: Vec<Uncarried>,
    /// Names for each table's messages; a table of the older iptables has one name.
    names: Vec<Vec<String>>,
}

impl Namespace {
    /// Returns the packet filter. Tables of the older iptables that the guest has (`carried`) are in it even
    /// when they have become empty.
    pub fn filter(
        &self,
        interfaces: &Interfaces,
        carried: &[XtablesTable],
    ) -> Result<Filter, NetworkError> {
        self.within(|| Filter::list(interfaces, carried)).map_err(NetworkError::Rules)
    }
}

impl Filter {
    fn list(interfaces: &Interfaces, carried: &[XtablesTable]) -> io::Result<Self> {
        let (tables, uncarried) = nftables_tables(interfaces)?;
        let mut filter = Self { uncarried, ..Self::default() };
        let mut length = 0;
        for table in tables {
            let messages = &table.table.messages;
            length += messages.iter().map(|one| one.attributes.len()).sum::<usize>();
            if filter.has_room(length, &table.names) {
                filter.nftables.push(table.table);
                filter.names.push(table.names);
            }
        }
        for table in xtables::tables(carried)? {
            filter.uncarried.extend(table.uncarried);
            let Some(wire) = table.table else { continue };
            length += wire.entries.len();
            if filter.has_room(length, std::slice::from_ref(&table.name)) {
                filter.xtables.push(wire);
                filter.names.push(vec![table.name]);
            }
        }
        Ok(filter)
    }

    fn has_room(&mut self, length: usize, names: &[String]) -> bool {
        if length <= MOST {
            return true;
        }
        let what = names.last().cloned().unwrap_or_default();
        let reason = format!("the rules take more than {} MiB", MOST >> 20);
        self.uncarried.push(Uncarried { what, reason });
        false
    }

    /// Returns the name of what the guest's kernel refused, and why. What the guest says of it is only
    /// numbers; those that mean nothing name nothing.
    pub fn refused(&self, refusals: &[FilterRefusal]) -> Vec<Uncarried> {
        let tables = self.names.iter().zip(0_u32..);
        let one = |(names, table): (&Vec<String>, u32)| {
            let refusal = refusals.iter().find(|refusal| refusal.table == table)?;
            let message = usize::try_from(refusal.message).unwrap_or(usize::MAX);
            let what = names.get(message).or(names.first())?.clone();
            let error = io::Error::from_raw_os_error(refusal.error);
            let reason = match refusal.error {
                libc::ENOENT | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP => {
                    format!("the guest's kernel does not have what it needs: {error}")
                }
                _ => format!("the guest's kernel refuses it: {error}"),
            };
            Some(Uncarried { what, reason })
        };
        tables.filter_map(one).collect()
    }
}

/// Lists the tables of nftables, again if they change meanwhile.
fn nftables_tables(interfaces: &Interfaces) -> io::Result<(Vec<nftables::Table>, Vec<Uncarried>)> {
    for _ in 0..TRIES {
        let Some(mut lists) = Lists::open()? else { return Ok(Default::default()) };
        match nftables::tables(&mut lists, interfaces) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            listed => return listed,
        }
    }
    Err(io::Error::other("they change all the time"))
}
