//! Programs that the kernel runs for us, by bpf(2): what is common to them, and the one that the host and
//! the guest both need.

pub mod steer;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands of bpf(2), from `linux/bpf.h`, as the numbers below.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 2;

/// One instruction: operation, destination and source register, offset (jumps count from the next one),
/// constant.
pub const fn instruction(operation: u8, to: u8, from: u8, offset: i16, constant: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = constant.to_le_bytes();
    u64::from_le_bytes([operation, from << 4 | to, low, high, a, b, c, d])
}

/// Lets `program` decide on devices for the processes of `cgroup`.
pub fn decide_on_devices(cgroup: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let program = load(PROG_TYPE_CGROUP_DEVICE, ATTACH_CGROUP_DEVICE, program)?;
    let to = [
        cgroup.as_raw_fd().cast_unsigned(),
        program.as_raw_fd().cast_unsigned(),
        ATTACH_CGROUP_DEVICE,
        ALLOW_MULTI,
    ];
    call(PROG_ATTACH, &to).map(drop)
}

/// Has the kernel check a program and keep it.
fn load(kind: u32, attach: u32, program: &[u64]) -> io::Result<OwnedFd> {
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
        kind,
        count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr(),
        license: c"Apache-2.0".as_ptr(),
        log: [0; 2],
        version_and_flags: 0,
        name: [0; 16],
        interface: 0,
        attach,
    };
    descriptor(call(PROG_LOAD, &load)?)
}

/// `attributes` is the beginning of `union bpf_attr` for the command.
fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads as many bytes as the attributes have; what they point to belongs to
    // the callers in this crate, which outlives the call.
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
