//! New connections and packets to addresses of a network namespace, steered to sockets of ours.
//!
//! A BPF program of type `sk_lookup`, attached to the namespace, chooses the socket of a new TCP
//! connection, or of a UDP packet for which none is connected, before the kernel looks for one by port
//! (Linux `Documentation/bpf/prog_sk_lookup.rst`). So nothing else has to be bound where the others
//! would be in its way. An accepted socket's own address is the one that was dialled. The attachment
//! lives as long as its descriptor: nothing is left behind by a process that was killed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{call, descriptor, instruction, load};

/// Commands of bpf(2), from `linux/bpf.h`, as the numbers below.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

const HELPER_MAP_LOOKUP: u32 = 1;
const HELPER_SK_RELEASE: u32 = 86;
const HELPER_SK_ASSIGN: u32 = 124;

/// Fields of `struct bpf_sk_lookup`, by their offsets.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
/// In this machine's byte order, unlike the addresses.
const LOCAL_PORT: i16 = 60;

/// What is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp = 6,
    /// Packets.
    Udp = 17,
}

/// Addresses that are dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// Those that have this one's bits where the mask has ones.
    V4(Ipv4Addr, Ipv4Addr),
    /// This one.
    V6(Ipv6Addr),
}

/// What goes to which socket.
#[derive(Debug, Clone, Copy)]
pub struct Rule<'a> {
    /// By this protocol.
    pub protocol: Protocol,
    /// To these addresses.
    pub to: Addresses,
    /// To this port, or to all.
    pub port: Option<u16>,
    /// A listener, or a bound socket, of the namespace.
    pub socket: BorrowedFd<'a>,
}

/// Steers what the first rule that fits says, in the namespace that `namespace` is open on, for as long as
/// what is returned lives. Kernels before Linux 5.9 refuse.
pub fn steer(namespace: BorrowedFd<'_>, rules: &[Rule<'_>]) -> io::Result<OwnedFd> {
    let map = create_map(rules.len())?;
    for (key, rule) in (0..).zip(rules) {
        put(&map, key, rule.socket)?;
    }
    let program = load(PROG_TYPE_SK_LOOKUP, ATTACH_SK_LOOKUP, &program(map.as_raw_fd(), rules))?;
    link(&program, namespace)
}

/// An [`instruction`] whose constant is a number without sign.
const fn code(operation: u8, to: u8, from: u8, offset: i16, value: u32) -> u64 {
    instruction(operation, to, from, offset, value.cast_signed())
}

const fn load_field(to: u8, offset: i16) -> u64 {
    code(0x61, to, 1, offset, 0)
}

/// Jumps over `skip` instructions where the lower half of `register` is another than `value`.
const fn unless(register: u8, value: u32, skip: i16) -> u64 {
    code(0x56, register, 0, skip, value)
}

/// Goes on behind itself, with the key in r2, where the rule fits, and else jumps over `rest` instructions
/// that follow it.
fn fits(rule: &Rule<'_>, key: u32, rest: i16) -> Vec<u64> {
    // What is asked, each by what loads it into r2 and what it must be then.
    let mut asked: Vec<(Vec<u64>, u32)> =
        vec![(vec![load_field(2, PROTOCOL)], rule.protocol as u32)];
    match rule.to {
        Addresses::V4(address, mask) => {
            // As they lie in memory: in the network's byte order.
            let [address, mask] = [address, mask].map(|one| u32::from_ne_bytes(one.octets()));
            asked.push((vec![load_field(2, FAMILY)], libc::AF_INET.cast_unsigned()));
            let masked = code(0x54, 2, 0, 0, mask);
            asked.push((vec![load_field(2, LOCAL_IP4), masked], address & mask));
        }
        Addresses::V6(address) => {
            asked.push((vec![load_field(2, FAMILY)], libc::AF_INET6.cast_unsigned()));
            let words = address.octets();
            for (offset, word) in (LOCAL_IP6..).step_by(4).zip(words.as_chunks::<4>().0) {
                asked.push((vec![load_field(2, offset)], u32::from_ne_bytes(*word)));
            }
        }
    }
    if let Some(port) = rule.port {
        asked.push((vec![load_field(2, LOCAL_PORT)], port.into()));
    }
    // From the last to the first, as each has to know how much follows.
    let mut block = vec![code(0xb7, 2, 0, 0, key)];
    for (load, value) in asked.into_iter().rev() {
        let skip = rest + i16::try_from(block.len()).unwrap_or(i16::MAX);
        block.splice(0..0, load.into_iter().chain([unless(2, value, skip)]));
    }
    block
}

/// Assigns the socket of the map `map` that the first rule that fits stands for.
fn program(map: i32, rules: &[Rule<'_>]) -> Vec<u64> {
    let copy = |to, from| code(0xbf, to, from, 0, 0);
    let call = |helper| code(0x85, 0, 0, 0, helper);
    let equal = |register, value, offset| code(0x15, register, 0, offset, value);
    let assign = [
        // The key is in r2: onto the stack with it.
        code(0x63, 10, 2, -4, 0),
        code(0x18, 1, 1, 0, map.cast_unsigned()),
        0,
        copy(2, 10),
        code(0x07, 2, 0, 0, (-4_i32).cast_unsigned()),
        call(HELPER_MAP_LOOKUP),
        equal(0, 0, 7),
        copy(7, 0),
        copy(1, 6),
        copy(2, 0),
        code(0xb7, 3, 0, 0, 0),
        call(HELPER_SK_ASSIGN),
        copy(1, 7),
        call(HELPER_SK_RELEASE),
    ];
    // SK_PASS: as chosen, or else as always.
    let end = [code(0xb7, 0, 0, 0, 1), code(0x95, 0, 0, 0, 0)];
    let length = |some: &[u64]| i16::try_from(some.len()).unwrap_or(i16::MAX);
    // From the last rule to the first: one that fits jumps over those behind it, to the assignment; the
    // last one that does not fit, over that.
    let mut blocks: Vec<u64> = Vec::new();
    for (key, rule) in rules.iter().enumerate().rev() {
        let key = u32::try_from(key).unwrap_or(u32::MAX);
        let last = blocks.is_empty();
        let onwards = code(0x05, 0, 0, length(&blocks), 0);
        let rest = if last { 1 + length(&assign) } else { 1 };
        let block = fits(rule, key, rest);
        blocks.splice(0..0, block.into_iter().chain([onwards]));
    }
    // The context is in r1, which calls do not keep.
    [&[copy(6, 1)], &blocks[..], &assign, &end].concat()
}

fn create_map(entries: usize) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    let entries = u32::try_from(entries).map_err(io::Error::other)?;
    let create = Create { kind: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, entries };
    descriptor(call(MAP_CREATE, &create)?)
}

fn put(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u32,
        _unused: u32,
        key: *const u32,
        value: *const u32,
        flags: u64,
    }
    let value = socket.as_raw_fd().cast_unsigned();
    let map = map.as_raw_fd().cast_unsigned();
    let update = Update { map, _unused: 0, key: &raw const key, value: &raw const value, flags: 0 };
    call(MAP_UPDATE_ELEM, &update).map(drop)
}

fn link(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let to = [
        program.as_raw_fd().cast_unsigned(),
        namespace.as_raw_fd().cast_unsigned(),
        ATTACH_SK_LOOKUP,
        0,
    ];
    descriptor(call(LINK_CREATE, &to)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    /// In a network namespace with nothing but a loopback device, unless this user may not make one.
    fn in_a_namespace(work: fn(&File)) {
        let apart = husk_skip::spawn(move || {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                return husk_skip::skipped("this user may not make a network namespace");
            }
            assert!(
                Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success()
            );
            work(&File::open("/proc/thread-self/ns/net").unwrap());
        });
        apart.join().unwrap();
    }

    fn rule(to: Addresses, port: Option<u16>, socket: BorrowedFd<'_>) -> Rule<'_> {
        Rule { protocol: Protocol::Tcp, to, port, socket }
    }

    #[test]
    fn each_goes_where_the_first_rule_that_fits_says() {
        in_a_namespace(|namespace| {
            let listeners: Vec<_> =
                (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
            let six = TcpListener::bind("[::1]:0").unwrap();
            let packets = UdpSocket::bind("127.0.0.11:0").unwrap();
            let one = Addresses::V4(Ipv4Addr::new(127, 0, 0, 11), Ipv4Addr::BROADCAST);
            let all = Addresses::V4(Ipv4Addr::LOCALHOST, Ipv4Addr::new(255, 0, 0, 0));
            // Bits beyond the mask do not count.
            let high = Addresses::V4(Ipv4Addr::new(127, 200, 1, 1), Ipv4Addr::new(255, 255, 0, 0));
            let rules = [
                rule(one, Some(53), listeners[0].as_fd()),
                rule(high, Some(65535), listeners[1].as_fd()),
                Rule { protocol: Protocol::Udp, ..rule(one, Some(53), packets.as_fd()) },
                rule(all, None, listeners[2].as_fd()),
                rule(Addresses::V6(Ipv6Addr::LOCALHOST), None, six.as_fd()),
            ];
            let steering = match steer(namespace.as_fd(), &rules) {
                // Such programs came with Linux 5.9.
                Err(error) => return eprintln!("skipped: {error}"),
                Ok(steering) => steering,
            };
            for (address, listener) in [
                ("127.0.0.11:53", &listeners[0]),
                ("127.200.3.4:65535", &listeners[1]),
                ("127.0.0.11:54", &listeners[2]),
                ("127.200.3.4:65534", &listeners[2]),
                ("[::1]:53", &six),
            ] {
                let mut dialled = TcpStream::connect(address).unwrap();
                let (mut accepted, _) = listener.accept().unwrap();
                assert_eq!(accepted.local_addr().unwrap().to_string(), address);
                dialled.write_all(b"!").unwrap();
                accepted.read_exact(&mut [0]).unwrap();
            }
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.connect("127.0.0.11:53").unwrap();
            client.send(b"question").unwrap();
            packets.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mut buffer = [0; 16];
            let (length, from) = packets.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"question"[..], client.local_addr().unwrap()));
            drop(steering);
            let refused = TcpStream::connect("127.0.0.11:53").unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn what_no_rule_says_goes_its_way() {
        in_a_namespace(|namespace| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let own = TcpListener::bind("127.0.0.1:80").unwrap();
            let to = Addresses::V4(Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST);
            let Ok(_steering) = steer(namespace.as_fd(), &[rule(to, Some(53), listener.as_fd())])
            else {
                return;
            };
            TcpStream::connect("127.0.0.1:80").unwrap();
            own.accept().unwrap();
            TcpStream::connect("127.0.0.2:53").unwrap_err();
            TcpStream::connect("127.0.0.1:53").unwrap();
            listener.accept().unwrap();
        });
    }
}
