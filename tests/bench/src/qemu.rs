//! QEMU's microvm, as lean as its documentation makes it: no firmware tables, no legacy devices,
//! virtio over MMIO, and the kernel's vhost for vsock.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Arguments, Boot, guest, process};

const CID: u32 = 3;

pub fn boot(arguments: &Arguments) -> Result<Boot> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("no vsock on this host (module vhost_vsock)")?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(nix::libc::VMADDR_CID_ANY, husk_agent_protocols::AGENT_PORT),
    )?;
    listen(&listener, Backlog::new(1)?)?;
    // Long, because the counting clock leaps while everything waits for the host; it ends a hang all
    // the same.
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::seconds(3600))?;

    let since = Instant::now();
    let monitor = process::start(&arguments.qemu, &words(arguments), &[])?;
    let connection = accept(listener.as_raw_fd()).context("QEMU's guest did not call")?;
    let ready = since.elapsed();
    // SAFETY: accept has just made this descriptor; nobody else has it.
    let connection = unsafe { OwnedFd::from_raw_fd(connection) };
    let _open = guest::shut_down(connection)?;
    process::wait(monitor)?;
    Ok(Boot { ready, ended: since.elapsed() })
}

fn words(arguments: &Arguments) -> Vec<String> {
    let memory = arguments.memory.to_string();
    let vcpus = arguments.vcpus.to_string();
    let kernel = arguments.kernel.display().to_string();
    let initrd = arguments.initrd.display().to_string();
    // A triple fault is the only reset that this machine has without ACPI.
    let command_line = format!("{} reboot=t", arguments.command_line);
    let device = format!("vhost-vsock-device,guest-cid={CID}");
    #[rustfmt::skip]
    let words = [
        "-machine",
        "microvm,accel=kvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=off,x-option-roms=off",
        "-cpu", "host",
        "-m", &memory,
        "-smp", &vcpus,
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-kernel", &kernel,
        "-initrd", &initrd,
        "-append", &command_line,
        "-device", &device,
    ];
    words.map(str::to_owned).to_vec()
}
