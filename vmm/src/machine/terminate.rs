//! SIGTERM ends the machine. Its process is the first of a PID namespace, for which the kernel ignores
//! every signal that has no handler.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

/// Status of a process that is ended before it has a machine.
const STATUS: c_int = 128 + libc::SIGTERM;

/// Whether the signal has come.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Event that wakes the loop which looks at [`ASKED`]; negative while there is none.
static EVENT: AtomicI32 = AtomicI32::new(-1);

/// Installs the handler. To be called before the process is confined.
pub fn install() -> std::io::Result<()> {
    register_signal_handler(libc::SIGTERM, handle).map_err(Into::into)
}

/// From now on the signal writes to `event`, which has to stay open.
pub(super) fn wake(event: &EventFd) {
    EVENT.store(event.as_raw_fd(), Ordering::SeqCst);
}

/// The event is about to close.
pub(super) fn wake_nobody() {
    EVENT.store(-1, Ordering::SeqCst);
}

/// Whether the signal has come.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Calls nothing but `write` and `exit_group`, which are on all lists, and takes no memory.
extern "C" fn handle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    ASKED.store(true, Ordering::SeqCst);
    let event: RawFd = EVENT.load(Ordering::SeqCst);
    if event < 0 {
        // SAFETY: the process ends here.
        unsafe { libc::_exit(STATUS) };
    }
    let one = 1u64;
    // SAFETY: the place of the thread's own error number, which the interrupted code may be about to
    // read; and eight bytes of an integer.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(event, (&raw const one).cast(), size_of::<u64>());
        *errno = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_wakes_the_loop() {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        install().unwrap();
        wake(&event);
        assert!(!asked());
        // SAFETY: a number; the handler is installed.
        unsafe { libc::raise(libc::SIGTERM) };
        assert!(asked());
        assert_eq!(event.read().unwrap(), 1);
        wake_nobody();
        ASKED.store(false, Ordering::SeqCst);
    }
}
