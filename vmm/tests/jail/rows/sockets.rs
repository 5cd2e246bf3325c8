//! Sockets, and descriptors that come through them.

use libc::{EACCES, EBADF, ECONNREFUSED, ENETUNREACH, ENOENT, EPERM, c_int, c_long};

use crate::host::Host;
use crate::role::{End, Row, SOCKET, Walls, call};

const SOCKETS: End = End::Named("socket");

/// The jail has no wall on every host: a machine's network is the pod's, and not all protocols are in a
/// network namespace at all.
const BY_FILTER: Walls = (End::FilterOnly, SOCKETS);

fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_long {
    let [family, kind, protocol] = [family, kind, protocol].map(|it| it.unsigned_abs().into());
    call(libc::SYS_socket, [family, kind, protocol])
}

fn connect(family: c_int, kind: c_int, address: &[u8]) -> c_long {
    let socket = socket(family, kind, 0);
    if socket < 0 {
        return socket;
    }
    call(libc::SYS_connect, [socket.cast_unsigned(), address.as_ptr() as u64, address.len() as u64])
}

/// `struct sockaddr_un`.
fn unix(name: &[u8]) -> c_long {
    let mut address = 1_u16.to_ne_bytes().to_vec();
    address.extend_from_slice(name);
    connect(libc::AF_UNIX, libc::SOCK_STREAM, &address)
}

/// `struct sockaddr_in` of 127.0.0.1.
fn loopback(port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    let [first, second] = 2_u16.to_ne_bytes();
    [first, second, high, low, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0].to_vec()
}

/// Sets the loopback device's flags to what they are.
fn set_up_network() -> c_long {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    if socket < 0 {
        return socket;
    }
    let mut request = [0_u8; 40];
    request[..2].copy_from_slice(b"lo");
    let at = request.as_mut_ptr() as u64;
    call(libc::SYS_ioctl, [socket.cast_unsigned(), libc::SIOCGIFFLAGS, at]);
    call(libc::SYS_ioctl, [socket.cast_unsigned(), libc::SIOCSIFFLAGS, at])
}

/// Passes on each descriptor that it was not given; the first that is one.
fn pass_on_others(host: &Host) -> c_long {
    for number in host.last + 1..1024 {
        // struct cmsghdr with one descriptor.
        let control = [20_u64, 1 | 1 << 32, u64::from(number.unsigned_abs())];
        let byte = 0_u8;
        let vector = [(&raw const byte) as u64, 1];
        let message = [0, 0, vector.as_ptr() as u64, 1, control.as_ptr() as u64, 24, 0_u64];
        let socket = u64::from(SOCKET.unsigned_abs());
        let sent = call(libc::SYS_sendmsg, [socket, message.as_ptr() as u64, 0]);
        if sent >= 0 || std::io::Error::last_os_error().raw_os_error() != Some(EBADF) {
            return 0;
        }
    }
    call(libc::SYS_fcntl, [1024, libc::F_GETFD.unsigned_abs().into()])
}

pub const ROWS: &[Row] = &[
    Row::both("connect to a socket's path", (End::Refused(&[ENOENT]), SOCKETS), |host| {
        unix(host.socket.as_bytes_with_nul())
    }),
    Row::each(
        "connect to an abstract socket",
        (End::Refused(&[EPERM]), SOCKETS),
        (End::Refused(&[EPERM, ECONNREFUSED]), SOCKETS),
        |host| unix(&[&[0], host.abstract_name.as_bytes()].concat()),
    )
    .since_landlock(6),
    Row::both("connect by TCP", (End::Refused(&[EACCES]), SOCKETS), |host| {
        connect(libc::AF_INET, libc::SOCK_STREAM, &loopback(host.tcp))
    })
    .since_landlock(4),
    Row::both("listen for TCP", (End::Refused(&[EACCES]), SOCKETS), |_| {
        let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return socket;
        }
        let address = loopback(9);
        call(libc::SYS_bind, [socket.cast_unsigned(), address.as_ptr() as u64, 16])
    })
    .since_landlock(4),
    Row::each("connect by UDP", BY_FILTER, (End::Refused(&[ENETUNREACH]), SOCKETS), |host| {
        connect(libc::AF_INET, libc::SOCK_DGRAM, &loopback(host.udp))
    }),
    Row::both("AF_NETLINK", BY_FILTER, |_| socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)),
    Row::both("AF_VSOCK", BY_FILTER, |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    Row::both("AF_ALG", BY_FILTER, |_| socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)),
    Row::both("AF_PACKET", (End::Refused(&[EPERM]), SOCKETS), |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
    }),
    Row::both("change a network device", (End::Refused(&[EPERM]), SOCKETS), |_| set_up_network()),
    Row::each(
        "SCM_RIGHTS of descriptors that it was not given",
        (End::Refused(&[EBADF]), End::Refused(&[EBADF])),
        (End::Refused(&[EBADF]), End::Named("sendmsg")),
        pass_on_others,
    ),
    Row::both(
        "any descriptor that it was not given",
        (End::Refused(&[EBADF]), End::Refused(&[EBADF])),
        |host| {
            let flags = |number: c_int| {
                let get = libc::F_GETFD.unsigned_abs().into();
                call(libc::SYS_fcntl, [number.unsigned_abs().into(), get])
            };
            (host.last + 1..1024).map(flags).max().unwrap_or(0)
        },
    ),
];
