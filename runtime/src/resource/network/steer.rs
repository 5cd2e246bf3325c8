//! Connections to a namespace's own loopback addresses, steered to two listeners of ours.
//!
//! A BPF program of type `sk_lookup`, attached to the namespace, chooses the listener of a new TCP
//! connection before the kernel looks for one by port (Linux `Documentation/bpf/prog_sk_lookup.rst`).
//! The accepted socket's own address is the one that was dialled, so it tells the port. The
//! attachment lives as long as its descriptor: nothing is left behind by a process that was killed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of bpf(2), from `linux/bpf.h`, as the numbers below.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
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

/// Steers new TCP connections to 127.0.0.0/8 to the first listener and those to ::1 to the second, if
/// there is one, in the namespace that `namespace` is open on, for as long as what is returned lives.
pub(super) fn steer(
    namespace: BorrowedFd<'_>,
    listeners: [Option<BorrowedFd<'_>>; 2],
) -> io::Result<OwnedFd> {
    let map = create_map()?;
    for (key, listener) in (0..).zip(listeners) {
        if let Some(listener) = listener {
            put(&map, key, listener)?;
        }
    }
    let program = load(&program(map.as_raw_fd()))?;
    link(&program, namespace)
}

/// One instruction: operation, registers, offset, immediate value.
fn code(operation: u8, to: u8, from: u8, offset: i16, value: u32) -> u64 {
    u64::from(operation)
        | u64::from(to | from << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(value) << 32
}

/// Assigns the listener of the map `map` that the dialled address stands for, if it is a loopback one.
fn program(map: i32) -> [u64; 36] {
    let load = |to, offset| code(0x61, to, 1, offset, 0);
    let copy = |to, from| code(0xbf, to, from, 0, 0);
    let set = |to, value| code(0xb7, to, 0, 0, value);
    let or = |to, from| code(0x4f, to, from, 0, 0);
    let equal = |register, value, offset| code(0x15, register, 0, offset, value);
    let differs = |register, value, offset| code(0x55, register, 0, offset, value);
    let call = |helper| code(0x85, 0, 0, 0, helper);
    [
        // The context is in r1; jumps count from the next instruction.
        copy(6, 1),
        load(2, PROTOCOL),
        differs(2, 6, 31),
        load(2, FAMILY),
        equal(2, 2, 11),
        differs(2, 10, 28),
        // ::1, in the network's byte order.
        load(2, LOCAL_IP6),
        load(3, LOCAL_IP6 + 4),
        or(2, 3),
        load(3, LOCAL_IP6 + 8),
        or(2, 3),
        differs(2, 0, 22),
        load(2, LOCAL_IP6 + 12),
        differs(2, 1_u32.to_be(), 20),
        set(2, 1),
        code(0x05, 0, 0, 4, 0),
        // 127.0.0.0/8: the first byte is the lowest here.
        load(2, LOCAL_IP4),
        code(0x57, 2, 0, 0, 0xff),
        differs(2, 127, 15),
        set(2, 0),
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
        set(3, 0),
        call(HELPER_SK_ASSIGN),
        copy(1, 7),
        call(HELPER_SK_RELEASE),
        // SK_PASS: as chosen, or else as always.
        set(0, 1),
        code(0x95, 0, 0, 0, 0),
    ]
}

fn create_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    let create = Create { kind: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, entries: 2 };
    descriptor(bpf(MAP_CREATE, &create)?)
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
    bpf(MAP_UPDATE_ELEM, &update).map(drop)
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: *const u64,
        license: *const libc::c_char,
        log: [u64; 2],
        version_and_flags: u64,
        name: [u8; 16],
        interface: u32,
        attach: u32,
    }
    let load = Load {
        kind: PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr(),
        license: c"Apache-2.0".as_ptr(),
        log: [0; 2],
        version_and_flags: 0,
        name: [0; 16],
        interface: 0,
        attach: ATTACH_SK_LOOKUP,
    };
    descriptor(bpf(PROG_LOAD, &load)?)
}

fn link(program: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let to = [
        program.as_raw_fd().cast_unsigned(),
        namespace.as_raw_fd().cast_unsigned(),
        ATTACH_SK_LOOKUP,
        0,
    ];
    descriptor(bpf(LINK_CREATE, &to)?)
}

/// `attributes` is the beginning of `union bpf_attr` for the command.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads as many bytes as the attributes have; what they point to belongs to
    // the callers above, which outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn descriptor(number: libc::c_long) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(io::Error::other)?;
    // SAFETY: only for results of commands that make a descriptor, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
