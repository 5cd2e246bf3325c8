//! Rules of the older iptables (iptables-legacy), which nftables does not list.
//!
//! A table exists in a namespace once it has been used there. Its length and its rules are socket options,
//! as in <linux/netfilter_ipv4/ip_tables.h> and ip6_tables.h.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use husk_agent_protocols::resolver::ADDRESS;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// The options: of a table's length, and of its entries. The same numbers for both protocols.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

/// Length of a table's name with its end.
const NAME: usize = 32;
/// Length of `struct ipt_getinfo`, and where it has the bytes of all entries.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
/// Length of `struct ipt_get_entries` before its entries.
const ENTRIES: usize = 40;

/// More than the kernel takes for a table, in bytes.
const MOST: usize = 64 << 20;

/// The mask of one address.
const ALL: [u8; 4] = [255; 4];
/// Where an entry of IPv4 says what is inverted, and the bits for its addresses.
const INVERTED: usize = 83;
const INVERTED_ADDRESSES: u8 = 0x18;

/// One of the two protocols, and the layout of its entries.
struct Protocol {
    program: &'static str,
    /// Lists the tables that there are.
    names: &'static str,
    family: AddressFamily,
    level: i32,
    /// Where an entry has the offsets of its target and of the next entry.
    offsets: usize,
    /// Where it has its source, its destination and their masks, if they can be Docker's.
    addresses: Option<[usize; 4]>,
}

const PROTOCOLS: [Protocol; 2] = [
    Protocol {
        program: "iptables",
        names: "/proc/thread-self/net/ip_tables_names",
        family: AddressFamily::Inet,
        level: libc::IPPROTO_IP,
        offsets: 88,
        addresses: Some([0, 4, 8, 12]),
    },
    Protocol {
        program: "ip6tables",
        names: "/proc/thread-self/net/ip6_tables_names",
        family: AddressFamily::Inet6,
        level: libc::IPPROTO_IPV6,
        offsets: 140,
        addresses: None,
    },
];

/// Returns the names of the rules in the namespace of the calling thread, without Docker's own.
pub(super) fn rules() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for protocol in &PROTOCOLS {
        // Without the module, or before it was used here, there is no table.
        let names = fs::read_to_string(protocol.names).unwrap_or_default();
        for table in names.lines().filter(|name| !name.is_empty() && name.len() < NAME) {
            let entries = protocol.entries(table)?;
            found.extend(protocol.rules(table, &entries));
        }
    }
    Ok(found)
}

impl Protocol {
    /// The entries of a table, as the kernel has them.
    fn entries(&self, table: &str) -> io::Result<Vec<u8>> {
        let none = None::<SockProtocol>;
        // Any socket of the protocol's will do, if root asks.
        let socket = match socket(self.family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, none) {
            Err(nix::errno::Errno::EAFNOSUPPORT) => return Ok(Vec::new()),
            other => other?,
        };
        let mut info = vec![0; INFO];
        info[..table.len()].copy_from_slice(table.as_bytes());
        ask(&socket, self.level, GET_INFO, &mut info)?;
        let size: [u8; 4] = info[INFO_SIZE..INFO].try_into().map_err(io::Error::other)?;
        let length = usize::try_from(u32::from_ne_bytes(size)).map_err(io::Error::other)?;
        if length > MOST {
            return Err(io::Error::other("a table of iptables is too large"));
        }
        let mut entries = vec![0; ENTRIES + length];
        entries[..NAME].copy_from_slice(&info[..NAME]);
        entries[NAME..NAME + 4].copy_from_slice(&size);
        // EAGAIN: changed in between, which is told, or looked at again at the next start.
        ask(&socket, self.level, GET_ENTRIES, &mut entries)?;
        entries.drain(..ENTRIES);
        Ok(entries)
    }

    /// The names of the rules among a table's entries. Chains begin and end with entries of their own: one whose
    /// target is ERROR, and one that matches everything and returns or is the chain's policy.
    fn rules(&self, table: &str, entries: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        let mut rest = entries;
        let mut number = 0;
        while let Some((entry, target, length)) = self.entry(rest) {
            rest = &rest[length..];
            number += 1;
            let name = String::from_utf8_lossy(target.get(2..31).unwrap_or_default());
            let name = name.split('\0').next().unwrap_or_default();
            // A standard target is a verdict: negative ones are final, others are jumps.
            let verdict = target.get(32..36).and_then(|bytes| bytes.try_into().ok());
            let verdict = verdict.map_or(0, i32::from_ne_bytes);
            let everything = entry[..self.offsets - 4].iter().all(|byte| *byte == 0);
            let effect = match name {
                "ERROR" => None,
                "" if everything && matches!(verdict, -2 | -5) => None,
                "" if verdict == -1 => Some("DROP"),
                "" if verdict == -2 => Some("ACCEPT"),
                "" if verdict < 0 => Some("RETURN"),
                "" => Some("jump"),
                name => Some(name),
            };
            let Some(effect) = effect.filter(|_| !self.is_dockers(entry)) else { continue };
            let program = self.program;
            found.push(format!("entry {number} ({effect}) of table {table} of {program}-legacy"));
        }
        found
    }

    /// The first of the entries: all of it, its target, and its length.
    fn entry<'a>(&self, entries: &'a [u8]) -> Option<(&'a [u8], &'a [u8], usize)> {
        let offset = |at: usize| {
            let bytes = entries.get(at..at + 2)?.try_into().ok()?;
            Some(usize::from(u16::from_ne_bytes(bytes)))
        };
        let (target, length) = (offset(self.offsets)?, offset(self.offsets + 2)?);
        let entry = entries.get(..length).filter(|entry| entry.len() > self.offsets + 4)?;
        Some((entry, entry.get(target..)?, length))
    }

    /// Whether the entry is for packets from or to Docker's name server only.
    fn is_dockers(&self, entry: &[u8]) -> bool {
        let Some([source, destination, source_mask, destination_mask]) = self.addresses else {
            return false;
        };
        let is = |address: usize, mask: usize| {
            let inverted = entry[INVERTED] & INVERTED_ADDRESSES != 0;
            !inverted
                && entry[address..address + 4] == ADDRESS.octets()
                && entry[mask..mask + 4] == ALL
        };
        is(source, source_mask) || is(destination, destination_mask)
    }
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
