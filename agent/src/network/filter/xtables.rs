//! Tables of the older iptables, replaced as the program iptables-legacy does it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// Options of a socket: of a table's length, and to replace it. The same numbers for both protocols.
const GET_INFO: i32 = 64;
const REPLACE: i32 = 64;

/// Length of a table's name with its end.
const NAME: usize = 32;
/// Length of `struct ipt_getinfo`, and where it has the number of entries.
const INFO: usize = 84;
const INFO_COUNT: usize = 76;
/// Bytes of `struct xt_counters`.
const COUNTERS: usize = 16;
/// How many hooks a table can have.
const HOOKS: usize = 5;

/// How often a table is replaced that others replace at the same time.
const TRIES: usize = 8;

/// A table: the fields of `struct ipt_replace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub ipv6: bool,
    pub name: String,
    pub valid_hooks: u32,
    pub entry_count: u32,
    pub hook_entries: Vec<u32>,
    pub underflows: Vec<u32>,
    pub entries: Vec<u8>,
}

impl Table {
    /// Returns whether it is the same table, whatever is in it.
    pub fn is(&self, other: &Self) -> bool {
        self.ipv6 == other.ipv6 && self.name == other.name
    }

    /// Returns the name with zeros behind it; `None` if it is too long.
    fn padded_name(&self) -> Option<[u8; NAME]> {
        let mut padded = [0; NAME];
        let room = padded.get_mut(..self.name.len()).filter(|room| room.len() < NAME)?;
        room.copy_from_slice(self.name.as_bytes());
        Some(padded)
    }

    /// Returns `struct ipt_replace`, for a table whose entries now have `counters`; `None` if the fields do not
    /// fit in.
    fn replacement(&self, counters: &mut [u8]) -> Option<Vec<u8>> {
        if self.hook_entries.len() != HOOKS || self.underflows.len() != HOOKS {
            return None;
        }
        let mut bytes = self.padded_name()?.to_vec();
        let size = u32::try_from(self.entries.len()).ok()?;
        let count = u32::try_from(counters.len() / COUNTERS).ok()?;
        let words = [self.valid_hooks, self.entry_count, size].into_iter();
        let words = words.chain(self.hook_entries.iter().chain(&self.underflows).copied());
        for word in words.chain([count]) {
            bytes.extend(word.to_ne_bytes());
        }
        let address = counters.as_mut_ptr().expose_provenance();
        bytes.extend(address.to_ne_bytes());
        bytes.extend(&self.entries);
        Some(bytes)
    }
}

/// Replaces a table in the namespace of the calling thread.
pub fn replace(table: &Table) -> io::Result<()> {
    let (family, level) = match table.ipv6 {
        true => (AddressFamily::Inet6, libc::IPPROTO_IPV6),
        false => (AddressFamily::Inet, libc::IPPROTO_IP),
    };
    let none = None::<SockProtocol>;
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, none)?;
    let mut tries = 0..TRIES;
    loop {
        let replaced = replace_once(socket.as_fd(), level, table);
        match replaced {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries.next().is_some() => {}
            replaced => return replaced,
        }
    }
}

fn replace_once(socket: BorrowedFd<'_>, level: i32, table: &Table) -> io::Result<()> {
    let odd = || io::Error::from_raw_os_error(libc::EINVAL);
    let mut info = [0; INFO];
    info[..NAME].copy_from_slice(&table.padded_name().ok_or_else(odd)?);
    let mut length = libc::socklen_t::try_from(INFO).map_err(io::Error::other)?;
    // SAFETY: the kernel reads and writes at most `length` bytes, which `info` has.
    let asked = unsafe {
        let value = info.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, value, &mut length)
    };
    if asked < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = info[INFO_COUNT..].first_chunk().copied().map_or(0, u32::from_ne_bytes);
    let count = usize::try_from(count).map_err(io::Error::other)?;
    let mut counters = vec![0; count * COUNTERS];
    let replacement = table.replacement(&mut counters).ok_or_else(odd)?;
    let length = libc::socklen_t::try_from(replacement.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes, which `replacement` has, and writes the counters of as many
    // entries as it says there is room for at the address in it, or none; `counters` outlives the call.
    let replaced = unsafe {
        let value = replacement.as_ptr().cast();
        libc::setsockopt(socket.as_raw_fd(), level, REPLACE, value, length)
    };
    if replaced < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
