//! What a vCPU left the guest for, and what is done about it.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use husk_control::EndReason;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Shared;

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Into the guest again.
    Run,
    /// A signal came: look for commands.
    Look,
    /// The machine has ended.
    End,
}

/// A port access: the data lies in the page shared with KVM.
struct PortAccess {
    port: u16,
    data: *mut u8,
    length: usize,
    write: bool,
}

/// Runs the guest until it needs something, and does it.
pub(super) fn run(fd: &mut VcpuFd, shared: &Shared) -> Next {
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(error) => {
            return match error.errno() {
                libc::EINTR => {
                    fd.set_kvm_immediate_exit(0);
                    Next::Look
                }
                libc::EAGAIN => Next::Run,
                _ => failed(shared, format!("a vCPU could not run: {error}")),
            };
        }
    };
    shared.exits.fetch_add(1, Ordering::Relaxed);
    match exit {
        VcpuExit::IoOut(port, data) => {
            let (pointer, length) = (data.as_ptr().cast_mut(), data.len());
            port_access(fd, shared, &PortAccess { port, data: pointer, length, write: true });
        }
        VcpuExit::IoIn(port, data) => {
            let (pointer, length) = (data.as_mut_ptr(), data.len());
            port_access(fd, shared, &PortAccess { port, data: pointer, length, write: false });
        }
        VcpuExit::MmioRead(address, data) => shared.memory.read(address, data),
        VcpuExit::MmioWrite(address, data) => shared.memory.write(address, data),
        // With the local APIC in the kernel a halted vCPU waits there.
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => return ended(shared, EndReason::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => shared.end.reset(),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            return ended(shared, EndReason::Panicked);
        }
        VcpuExit::SystemEvent(kind, _) => {
            return failed(shared, format!("KVM reported the system event {kind}"));
        }
        VcpuExit::FailEntry(reason, cpu) => {
            return failed(
                shared,
                format!("the processor {cpu} refused to enter the guest (reason {reason:#x})"),
            );
        }
        VcpuExit::InternalError => {
            return failed(shared, "KVM could not emulate what the guest did".to_owned());
        }
        other => return failed(shared, format!("a vCPU left the guest unexpectedly: {other:?}")),
    }
    if shared.end.has_ended() { Next::End } else { Next::Run }
}

/// Carries out a port access; a string instruction's many, one by one.
fn port_access(fd: &mut VcpuFd, shared: &Shared, access: &PortAccess) {
    take_put_off(fd, shared);
    // SAFETY: the exit was KVM_EXIT_IO, so this part of the union is the valid one.
    let size = usize::from(unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size }).max(1);
    // SAFETY: the slice was just handed out by `run` for this vCPU: `length` bytes inside the page
    // that stays mapped as long as `fd`, which is borrowed here and used by nobody else meanwhile.
    let data = unsafe { std::slice::from_raw_parts_mut(access.data, access.length) };
    let port = u64::from(access.port);
    for item in data.chunks_mut(size) {
        if access.write {
            shared.ports.write(port, item);
        } else {
            shared.ports.read(port, item);
        }
    }
}

/// Carries out the port writes KVM has put off; before any other port access, and before a pause.
pub(super) fn take_put_off(fd: &mut VcpuFd, shared: &Shared) {
    let _guard = shared.put_off.lock().unwrap_or_else(PoisonError::into_inner);
    while let Ok(Some(write)) = fd.coalesced_mmio_read() {
        // KVM puts at most eight bytes into an entry.
        if let Some(data) = usize::try_from(write.len).ok().and_then(|len| write.data.get(..len)) {
            shared.ports.write(write.phys_addr, data);
        }
    }
}

fn failed(shared: &Shared, error: String) -> Next {
    ended(shared, EndReason::Failed { error })
}

fn ended(shared: &Shared, reason: EndReason) -> Next {
    shared.end.end(reason);
    Next::End
}
