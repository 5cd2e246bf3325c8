//! Makes a vCPU's thread leave the guest.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// Where this thread's vCPU has its `immediate_exit`; null in all other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that means "look for commands".
pub(super) fn signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler, once a process.
pub(super) fn install() -> std::io::Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| {
        result = register_signal_handler(signal(), handle).map_err(Into::into);
    });
    result
}

/// Ties a vCPU to the thread it runs on.
pub(super) struct Kickable {
    fd: VcpuFd,
}

impl Kickable {
    /// From now on a signal to this thread makes `fd` leave the guest.
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self { fd }
    }

    pub(super) fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

extern "C" fn handle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let target = IMMEDIATE_EXIT.get();
    if !target.is_null() {
        // SAFETY: the pointer leads into the page that the kernel shares with this thread's vCPU,
        // which `Kickable` keeps mapped for as long as the pointer is set; one byte, this thread.
        unsafe { target.write_volatile(1) };
    }
}
