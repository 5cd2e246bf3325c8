//! The channels between the machine and the file server, from both ends: what a machine that was taken
//! over may send to the file server, and what a file server that was may answer.
//!
//! The file server answers each request that it can follow once, in the order they came, and touches
//! nothing but its folder, here a file system of its own.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use husk_vmm::files::serve_one;

use crate::answers;
use crate::input::Input;

/// Bytes of a request's header and of an answer's.
pub(crate) const IN_HEADER: usize = 40;
pub(crate) const OUT_HEADER: usize = 16;

/// The longest message: 1 MiB, and a page for what goes before.
const LONGEST: usize = (1 << 20) + 4096;
const MOST_REQUESTS: usize = 64;

/// Names, of which some are there.
const NAMES: [&[u8]; 16] = [
    b"file",
    b"folder",
    b"link",
    b"pipe",
    b"socket",
    b"new",
    b"..",
    b".",
    b"",
    b"a/b",
    b"/",
    b"../file",
    b"\xff",
    b"user.a",
    b"security.capability",
    b"system.posix_acl_access",
];

/// Requests without an answer: FORGET, INTERRUPT, NOTIFY_REPLY, BATCH_FORGET.
const SILENT: [u32; 4] = [2, 36, 41, 42];

/// `FSCONFIG_SET_STRING`, `FSCONFIG_CMD_CREATE`, `MOUNT_ATTR_NODEV`.
const STRING: u32 = 1;
const CREATE: u32 = 6;
const NO_DEVICES: u32 = 4;

/// A byte that chooses the end, and what comes there.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    if input.byte() & 1 == 1 {
        return answers::run(&mut input);
    }
    // Without root there are no file systems to be had.
    let Ok(folder) = folder() else { return };
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    std::thread::scope(|scope| {
        // The server has a working directory and ids of its own, which are a thread's.
        scope.spawn(|| {
            if let Err(error) = serve_one(folder.as_fd(), theirs.into(), None) {
                drop(error.to_string());
            }
        });
        talk(ours, &mut input);
    });
}

/// A fresh file system, mounted nowhere, with one entry of each kind.
fn folder() -> io::Result<OwnedFd> {
    let own = |result: libc::c_long| match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(descriptor @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the kernel reads the name, which ends with a zero.
    let context = own(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1) })?;
    let set = |command: u32, key: &std::ffi::CStr, value: Option<&std::ffi::CStr>| {
        let (at, value) = (context.as_raw_fd(), value.map_or(std::ptr::null(), |it| it.as_ptr()));
        let key = if command == CREATE { std::ptr::null() } else { key.as_ptr() };
        // SAFETY: the kernel reads key and value, which end with a zero or are not there.
        match unsafe { libc::syscall(libc::SYS_fsconfig, at, command, key, value, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(STRING, c"size", Some(c"4m"))?;
    set(STRING, c"nr_inodes", Some(c"256"))?;
    set(CREATE, c"", None)?;
    // SAFETY: plain numbers: close-on-exec, and no devices.
    let mount =
        own(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, NO_DEVICES) })?;
    let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    std::fs::write(root.join("file"), [7; 5000])?;
    std::fs::create_dir_all(root.join("folder/inner"))?;
    symlink("/etc/passwd", root.join("link"))?;
    drop(UnixListener::bind(root.join("socket"))?);
    nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU)?;
    Ok(mount)
}

/// Sends what the input says, and hears every answer out, until one side has enough.
fn talk(socket: UnixStream, input: &mut Input<'_>) {
    // What answers gave: nodes and handles.
    let mut known: Vec<u64> = vec![1];
    let mut socket = &socket;
    let mut asked = Vec::new();
    for unique in 1..=MOST_REQUESTS as u64 {
        if input.is_empty() {
            return;
        }
        let opcode = opcode(input);
        let body = body(opcode, input, &known);
        let node = number(input, &known);
        let lie = if input.byte() == 0 { u32::from(input.word()) } else { 0 };
        let length = u32::try_from(IN_HEADER + body.len()).expect("short").wrapping_add(lie);
        let ids = [u32::from(input.byte()), u32::from(input.byte() & 1), 1, 0];
        let mut message = [length, opcode].map(u32::to_ne_bytes).concat();
        message.extend([unique, node].map(u64::to_ne_bytes).concat());
        message.extend(ids.map(u32::to_ne_bytes).concat());
        message.extend(body);
        asked.push(opcode);
        if socket.write_all(&message).is_err() {
            return;
        }
        if lie != 0 {
            // Who waits for the rest of it sees the end.
            return socket.shutdown(Shutdown::Write).expect("a socket");
        }
        if SILENT.contains(&opcode) {
            continue;
        }
        let (answered, answer) = answer(&mut socket)
            .unwrap_or_else(|error| panic!("of {asked:?}, the last ended the channel: {error}"));
        assert_eq!(answered, unique, "of {asked:?}, an answer to another request");
        for at in [0, 40, 128] {
            known.extend(
                answer.get(at..at + 8).map(|it| u64::from_ne_bytes(it.try_into().expect("8"))),
            );
        }
        known.truncate(32);
    }
}

/// Takes one answer: to which request, and what.
fn answer(socket: &mut &UnixStream) -> io::Result<(u64, Vec<u8>)> {
    let mut header = [0; OUT_HEADER];
    socket.read_exact(&mut header)?;
    let [l0, l1, l2, l3, e0, e1, e2, e3, rest @ ..] = header;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    let error = i32::from_ne_bytes([e0, e1, e2, e3]);
    assert!((OUT_HEADER..=LONGEST).contains(&length), "an answer of {length} bytes");
    assert!((-4095..=0).contains(&error) && (error == 0 || length == OUT_HEADER));
    let mut payload = vec![0; length - OUT_HEADER];
    // Once begun, it comes whole.
    socket.read_exact(&mut payload).expect("a whole answer");
    Ok((u64::from_ne_bytes(rest), payload))
}

fn opcode(input: &mut Input<'_>) -> u32 {
    match input.byte() {
        byte @ 0..=51 => u32::from(byte),
        // LOOKUP, OPEN, CREATE, WRITE, READ, READDIRPLUS, more often than the others.
        byte @ 52..=240 => [1, 14, 35, 16, 15, 27, 44, 6, 8, 9, 12, 45][usize::from(byte) % 12],
        _ => input.long(),
    }
}

/// Mostly one that was told.
fn number(input: &mut Input<'_>, known: &[u64]) -> u64 {
    match input.byte() {
        byte @ 0..=200 => known[usize::from(byte) % known.len()],
        byte @ 201..=240 => u64::from(byte) - 201,
        _ => u64::from(input.long()) << 32 | u64::from(input.long()),
    }
}

/// Fixed parts of a body, by their meaning: a number as above, so many bytes that the input says, or
/// flags for open(2).
fn body(opcode: u32, input: &mut Input<'_>, known: &[u64]) -> Vec<u8> {
    let (numbers, words, names) = match opcode {
        1 | 10 | 11 | 24 => (0, 0, 1),
        6 => (0, 0, 2),
        8 | 35 => (0, 4, 1),
        9 | 13 => (1, 0, 1),
        12 => (1, 0, 2),
        45 => (1, 2, 2),
        14 | 27 | 50 => (0, 2, 0),
        15 | 28 | 44 => (2, 6, 0),
        18 | 25 | 29 | 20 | 30 => (1, 4, 0),
        3 => (0, 4, 0),
        4 => (1, 20, 0),
        16 => return write(input, known),
        21 => return set_attribute(input),
        22 => (0, 2, 1),
        43 => (3, 2, 0),
        47 => (7, 0, 0),
        46 => (2, 2, 0),
        51 => (0, 4, 1),
        _ => (0, usize::from(input.byte()) % 20, usize::from(input.byte()) % 3),
    };
    let mut body = Vec::new();
    for _ in 0..numbers {
        body.extend(number(input, known).to_ne_bytes());
    }
    for _ in 0..words {
        body.extend(word(input).to_ne_bytes());
    }
    for _ in 0..names {
        body.extend_from_slice(name(input));
        body.push(0);
    }
    if input.byte() > 250 {
        body.pop();
    }
    body
}

/// Small, a bit, or anything.
fn word(input: &mut Input<'_>) -> u32 {
    match input.byte() {
        byte @ 0..=63 => u32::from(byte),
        byte @ 64..=191 => 1 << (byte % 32),
        192..=200 => u32::MAX,
        _ => input.long(),
    }
}

fn name(input: &mut Input<'_>) -> &'static [u8] {
    NAMES[usize::from(input.byte()) % NAMES.len()]
}

/// The handle, where, how much of how much there is, and flags.
fn write(input: &mut Input<'_>, known: &[u64]) -> Vec<u8> {
    let mut body = number(input, known).to_ne_bytes().to_vec();
    body.extend(u64::from(word(input)).to_ne_bytes());
    let there = usize::from(input.word()) % 9000;
    let said = if input.byte() == 0 { input.long() } else { u32::try_from(there).expect("short") };
    body.extend([said, word(input), 0, 0, word(input), 0].map(u32::to_ne_bytes).concat());
    body.resize(body.len() + there, 9);
    body
}

fn set_attribute(input: &mut Input<'_>) -> Vec<u8> {
    let there = usize::from(input.byte());
    let said = if input.byte() == 0 { input.long() } else { u32::try_from(there).expect("short") };
    let mut body = [said, word(input)].map(u32::to_ne_bytes).concat();
    body.extend_from_slice(name(input));
    body.push(0);
    body.extend((0..there).map(|_| input.byte()));
    body
}
