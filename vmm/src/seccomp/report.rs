//! What happens at a call that no list has: it is named, and the process ends.

use std::cell::Cell;
use std::io;

use libc::{c_int, c_void, siginfo_t};
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::Thread;

/// The status with which a process ends that has called what it may not: as a shell shows a death by
/// `SIGSYS`.
pub const STATUS: c_int = 128 + libc::SIGSYS;

/// Where `siginfo_t` of a `SIGSYS` has the call's number (after signal, error, code and address).
const NUMBER_AT: usize = 24;

/// Bytes of the message, at most.
const LONGEST: usize = 256;

thread_local! {
    /// What this thread is called in the message.
    static NAME: Cell<&'static str> = const { Cell::new("new") };
}

/// Installs the handler. From then on it cannot be changed: `rt_sigaction` is on no list.
pub(super) fn install() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, handle).map_err(Into::into)
}

/// What the calling thread is called.
pub(super) fn name_thread(thread: Thread) {
    NAME.set(thread.name());
}

/// A text of limited length, made without the allocator.
struct Text {
    bytes: [u8; LONGEST],
    length: usize,
}

impl std::fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = &mut self.bytes[self.length..];
        let count = room.len().min(text.len());
        room[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

/// Calls nothing but `write` and `exit_group`, which are on all lists, and takes no memory.
extern "C" fn handle(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a whole siginfo, whose part for SIGSYS has an int there.
    let number = unsafe { info.cast::<u8>().add(NUMBER_AT).cast::<c_int>().read() };
    // SAFETY: the third argument of such a handler is a ucontext.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: c_int| registers[usize::try_from(register).unwrap_or(0)];
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("?", |call| call.name());
    let mut text = Text { bytes: [0; LONGEST], length: 0 };
    // It never fails: what is too long is cut.
    let _ = std::fmt::write(
        &mut text,
        format_args!(
            "seccomp: a {} thread called {name} ({number}) with {:#x}, {:#x}, {:#x}; it may not\n",
            NAME.get(),
            argument(libc::REG_RDI),
            argument(libc::REG_RSI),
            argument(libc::REG_RDX),
        ),
    );
    // SAFETY: the bytes are there; then the process ends at once.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.length);
        libc::_exit(STATUS);
    }
}
