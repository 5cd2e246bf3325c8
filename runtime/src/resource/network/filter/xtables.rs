//! Rules of the older iptables (iptables-legacy), which nftables does not list.
//!
//! A table exists in a namespace once it has been used there. Its length and its rules are socket options,
//! as in <linux/netfilter_ipv4/ip_tables.h> and ip6_tables.h. What one kernel gives another takes, as it is: so
//! does the program iptables-legacy, which reads the whole table, changes it and writes it back.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use husk_agent_protocols::agent::XtablesTable;
use husk_agent_protocols::resolver::ADDRESS;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::Uncarried;
use super::expression::{CONTROL_GROUP, IP_SET, Reason};

/// The options: of a table's length, and of its entries. The same numbers for both protocols.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

/// Length of a table's name with its end.
const NAME: usize = 32;
/// What an entry decides, from -1 on downwards; the third is -5. One that is not negative is a jump.
const VERDICTS: [&str; 4] = ["DROP", "ACCEPT", "RETURN", JUMP];
const JUMP: &str = "jump";

/// Length of `struct ipt_getinfo`: the name, and words.
const INFO: usize = 84;
/// Length of `struct ipt_get_entries` before its entries.
const ENTRIES: usize = 40;

/// More than the kernel takes for a table, in bytes.
const MOST: usize = 64 << 20;

/// How many hooks a table can have.
const HOOKS: usize = 5;
/// Bytes of an entry's counters.
const COUNTERS: usize = 16;

/// Where an entry of IPv4 has its addresses and their masks.
const SOURCE: usize = 0;
const DESTINATION: usize = 4;
const SOURCE_MASK: usize = 8;
const DESTINATION_MASK: usize = 12;
/// The mask of one address.
const ALL: [u8; 4] = [255; 4];
/// Where an entry of IPv4 says what is inverted, and the bits for its addresses.
const INVERTED: usize = 83;
const INVERTED_ADDRESSES: u8 = 0x18;
const INVERTED_DESTINATION: u8 = 0x10;

/// One of the two protocols, and the layout of its entries.
struct Protocol {
    program: &'static str,
    /// Lists the tables that there are.
    names: &'static str,
    family: AddressFamily,
    level: i32,
    /// Where an entry has the offsets of its target and of the next entry.
    offsets: usize,
    /// Length of an entry before its matches.
    length: usize,
}

const PROTOCOLS: [Protocol; 2] = [
    Protocol {
        program: "iptables",
        names: "/proc/thread-self/net/ip_tables_names",
        family: AddressFamily::Inet,
        level: libc::IPPROTO_IP,
        offsets: 88,
        length: 112,
    },
    Protocol {
        program: "ip6tables",
        names: "/proc/thread-self/net/ip6_tables_names",
        family: AddressFamily::Inet6,
        level: libc::IPPROTO_IPV6,
        offsets: 140,
        length: 168,
    },
];

/// A table that has an effect, or that the guest has already.
pub struct Table {
    /// `None` if it cannot be carried.
    pub table: Option<XtablesTable>,
    /// The first of its rules, and how many more there are.
    pub name: String,
    pub uncarried: Option<Uncarried>,
}

/// Returns the tables in the namespace of the calling thread that hold other rules than Docker's, and those that
/// are `carried`.
pub fn tables(carried: &[XtablesTable]) -> io::Result<Vec<Table>> {
    let mut found = Vec::new();
    for protocol in &PROTOCOLS {
        // Without the module, or before it was used here, there is no table.
        let names = fs::read_to_string(protocol.names).unwrap_or_default();
        let mut names: Vec<_> =
            names.lines().filter(|name| !name.is_empty() && name.len() < NAME).collect();
        // In no order of the kernel's that lasts.
        names.sort_unstable();
        for name in names {
            let table = protocol.table(name)?;
            let is_carried = |one: &XtablesTable| one.name == name && one.ipv6 == protocol.ipv6();
            found.extend(protocol.carry(table, carried.iter().any(is_carried)));
        }
    }
    Ok(found)
}

impl Protocol {
    fn ipv6(&self) -> bool {
        self.family == AddressFamily::Inet6
    }

    /// Returns a table as the kernel has it.
    fn table(&self, name: &str) -> io::Result<XtablesTable> {
        let none = None::<SockProtocol>;
        // Any socket of the protocol's will do, if root asks.
        let socket = socket(self.family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, none)?;
        let mut info = [0; INFO];
        info[..name.len()].copy_from_slice(name.as_bytes());
        ask(&socket, self.level, GET_INFO, &mut info)?;
        let mut words = info[NAME..].chunks_exact(4).map(|word| match *word {
            [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]),
            _ => 0,
        });
        let valid_hooks = words.next().unwrap_or_default();
        let hook_entries = words.by_ref().take(HOOKS).collect();
        let underflows = words.by_ref().take(HOOKS).collect();
        let entry_count = words.next().unwrap_or_default();
        let size = words.next().unwrap_or_default();
        let length = usize::try_from(size).map_err(io::Error::other)?;
        if length > MOST {
            return Err(io::Error::other("a table of iptables is too large"));
        }
        let mut entries = vec![0; ENTRIES + length];
        entries[..NAME].copy_from_slice(&info[..NAME]);
        entries[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
        // EAGAIN: changed in between, which is told, or looked at again at the next start.
        ask(&socket, self.level, GET_ENTRIES, &mut entries)?;
        entries.drain(..ENTRIES);
        Ok(XtablesTable {
            ipv6: self.ipv6(),
            name: name.to_owned(),
            valid_hooks,
            entry_count,
            hook_entries,
            underflows,
            entries,
            ..XtablesTable::default()
        })
    }

    /// Makes the table one for the guest: without Docker's rules, and without counts. `None` if it has no effect,
    /// and the guest does not have it yet.
    fn carry(&self, mut table: XtablesTable, is_carried: bool) -> Option<Table> {
        // The one that tells the most: it does something else than to decide or to jump.
        let mut telling = None;
        let mut count = 0;
        let mut uncarried = None;
        let (mut at, mut number) = (0, 0);
        while let Some(length) = self.entry_length(&table.entries[at..]) {
            let entry = &mut table.entries[at..at + length];
            at += length;
            number += 1;
            self.forget(entry);
            let Some(effect) = self.effect(entry) else { continue };
            if self.is_dockers(entry) {
                never_match(entry);
                continue;
            }
            let (program, table) = (self.program, &table.name);
            let name = format!("entry {number} ({effect}) of table {table} of {program}-legacy");
            if let Some(reason) = self.reason(entry).filter(|_| uncarried.is_none()) {
                uncarried = Some(Uncarried { what: name.clone(), reason: reason.to_owned() });
            }
            let tells = !VERDICTS.contains(&effect.as_str());
            if telling.as_ref().is_none_or(|(_, before)| tells && !before) {
                telling = Some((name, tells));
            }
            count += 1;
        }
        let name = match telling {
            None if !is_carried => return None,
            None => format!("table {} of {}-legacy", table.name, self.program),
            Some((only, _)) if count == 1 => only,
            Some((one, _)) => format!("{one} (and {} more)", count - 1),
        };
        let table = uncarried.is_none().then_some(table);
        Some(Table { table, name, uncarried })
    }

    /// Clears what the kernel counts and notes in an entry.
    fn forget(&self, entry: &mut [u8]) {
        // Both offsets have two bytes; the kernel's note follows them, and the counters end the entry proper.
        entry[self.offsets + 4..self.offsets + 8].fill(0);
        entry[self.length - COUNTERS..self.length].fill(0);
    }

    /// Returns what an entry does; `None` for the entries with which chains begin and end: one whose target is
    /// ERROR, and one that matches everything and returns or is the chain's policy.
    fn effect(&self, entry: &[u8]) -> Option<String> {
        let target = entry.get(self.offset(entry, self.offsets)?..)?;
        // A standard target is a verdict: negative ones are final, others are jumps.
        let verdict = target.get(32..36).and_then(|bytes| bytes.try_into().ok());
        let verdict = verdict.map_or(0, i32::from_ne_bytes);
        let everything = entry[..self.offsets - 4].iter().all(|byte| *byte == 0);
        match extension(target).as_str() {
            "ERROR" => None,
            "" if everything && matches!(verdict, -2 | -5) => None,
            "" if verdict < 0 => {
                let at = usize::try_from(-1 - verdict).map_or(2, |at| at.min(2));
                Some(VERDICTS[at].to_owned())
            }
            "" => Some(JUMP.to_owned()),
            name => Some(name.to_owned()),
        }
    }

    /// Returns why an entry cannot be carried: it names something of the host's.
    fn reason(&self, entry: &[u8]) -> Option<Reason> {
        let target = self.offset(entry, self.offsets)?;
        let mut matches = entry.get(self.length..target)?;
        while let Some(length) = self.offset(matches, 0).filter(|length| *length > 0) {
            match extension(matches).as_str() {
                "cgroup" => return Some(CONTROL_GROUP),
                "set" => return Some(IP_SET),
                _ => matches = matches.get(length..)?,
            }
        }
        (extension(entry.get(target..)?) == "SET").then_some(IP_SET)
    }

    fn offset(&self, bytes: &[u8], at: usize) -> Option<usize> {
        let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_ne_bytes(bytes)))
    }

    /// Returns the length of the first of the entries.
    fn entry_length(&self, entries: &[u8]) -> Option<usize> {
        let length = self.offset(entries, self.offsets + 2)?;
        (length >= self.length && length <= entries.len()).then_some(length)
    }

    /// Returns whether the entry is for packets from or to Docker's name server only.
    fn is_dockers(&self, entry: &[u8]) -> bool {
        let is = |address: usize, mask: usize| {
            let inverted = entry[INVERTED] & INVERTED_ADDRESSES != 0;
            !inverted
                && entry[address..address + 4] == ADDRESS.octets()
                && entry[mask..mask + 4] == ALL
        };
        !self.ipv6() && (is(SOURCE, SOURCE_MASK) || is(DESTINATION, DESTINATION_MASK))
    }
}

/// Makes an entry of IPv4 match no packet, in its place: all but every destination.
fn never_match(entry: &mut [u8]) {
    entry[DESTINATION..DESTINATION + 4].fill(0);
    entry[DESTINATION_MASK..DESTINATION_MASK + 4].fill(0);
    entry[INVERTED] |= INVERTED_DESTINATION;
}

/// Returns the name of a match or a target, which stands behind its length.
fn extension(bytes: &[u8]) -> String {
    let name = bytes.get(2..31).unwrap_or_default();
    String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Has the kernel fill `value`, whose beginning says what is asked.
fn ask(socket: &OwnedFd, level: i32, option: i32, value: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let socket: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(socket);
    // SAFETY: the kernel writes at most `length` bytes, which `value` has; no wrapper passes a value in.
    let asked = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &mut length)
    };
    if asked < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
