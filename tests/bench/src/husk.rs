//! Husk's own monitor, driven over its control socket as the shim does it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use husk_agent_protocols::AGENT_PORT;
use husk_control::{
    BootConfig, CONTROL_FD, Console, EndReason, Event, MachineMessage, MachineRequest, Request,
    receive, send, socket_pair,
};

use crate::{Arguments, Boot, guest, process};

pub fn boot(arguments: &Arguments) -> Result<Boot> {
    let vmm = arguments.vmm.as_deref().context("no --vmm")?;
    let (ours, theirs) = socket_pair()?;

    let since = Instant::now();
    let monitor = process::start(vmm, &["machine".to_owned()], &[(theirs.as_fd(), CONTROL_FD)])?;
    drop(theirs);
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let kernel = File::open(&arguments.kernel)?;
    let initrd = File::open(&arguments.initrd)?;
    let mut descriptors = vec![kvm.as_fd(), kernel.as_fd(), initrd.as_fd()];
    let console = arguments.console.as_ref().map(File::create).transpose()?;
    if let Some(console) = &console {
        descriptors.push(console.as_fd());
    }
    let config = BootConfig {
        kvm: 0,
        kernel: 1,
        initrd: Some(2),
        command_line: arguments.command_line.clone(),
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory.into(),
        max_vcpus: arguments.max_vcpus,
        max_memory_mib: arguments.max_memory,
        console: console.as_ref().map(|_| Console { log: 3, limit: 1 << 20 }),
        shared_folder: None,
        network: Vec::new(),
    };
    send(&ours, &Request { id: 1, request: MachineRequest::Boot(Box::new(config)) }, &descriptors)?;
    ask(&ours, 2, MachineRequest::Listen { port: AGENT_PORT })?;

    let connection = loop {
        let mut packet =
            receive::<MachineMessage>(&ours)?.context("husk-vmm ended before the agent dialled")?;
        match packet.message.clone() {
            MachineMessage::Event(Event::Connection { port: AGENT_PORT }) => {
                break packet.take(0)?;
            }
            message => expected(message)?,
        }
    };
    let ready = since.elapsed();
    ask(&ours, 3, MachineRequest::ExpectEnd)?;
    let _open = guest::shut_down(connection)?;
    while let Some(packet) = receive::<MachineMessage>(&ours)? {
        expected(packet.message)?;
    }
    process::wait(monitor)?;
    Ok(Boot { ready, ended: since.elapsed() })
}

fn ask(socket: &OwnedFd, id: u64, request: MachineRequest) -> Result<()> {
    Ok(send(socket, &Request { id, request }, &[])?)
}

/// Lets pass what belongs to an orderly life, and nothing else.
fn expected(message: MachineMessage) -> Result<()> {
    match message {
        MachineMessage::Reply { result: Ok(_), .. }
        | MachineMessage::Event(Event::Ended { reason: EndReason::PoweredOff }) => Ok(()),
        MachineMessage::Reply { result: Err(error), .. } => bail!("husk-vmm refused: {error}"),
        message => bail!("unexpected from husk-vmm: {message:?}"),
    }
}
