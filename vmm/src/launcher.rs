//! `husk-vmm boot`: plays the shim's part for one machine, for developers and benchmarks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use husk_control::{
    BootConfig, CONTROL_FD, Console, EndReason, Event, FilesConfig, FilesMessage, FilesRequest,
    MachineMessage, MachineRequest, Request, SharedFolder, receive, send, socket_pair,
};

const AGENT_PORT: u32 = 1024;
const CONSOLE_LIMIT: u64 = 64 << 20;
const CHANNELS: usize = 4;
const SHARE_TAG: &str = "husk";

/// What to boot.
#[derive(Debug, clap::Args)]
pub struct BootOptions {
    /// The uncompressed ELF kernel
    #[arg(long)]
    kernel: PathBuf,
    /// The initial RAM file system
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Virtual CPUs there can be
    #[arg(long, default_value_t = 0)]
    max_vcpus: u8,
    /// Guest memory there can be, in MiB
    #[arg(long, default_value_t = 0)]
    max_memory: u64,
    /// The kernel's command line, in place of the default one
    #[arg(long, default_value = husk_control::DEFAULT_COMMAND_LINE)]
    command_line: String,
    /// Append this to the command line
    #[arg(long)]
    append: Option<String>,
    /// Log the serial console to this file
    #[arg(long)]
    console: Option<PathBuf>,
    /// Share this folder as the virtio-fs tag `husk`
    #[arg(long)]
    share: Option<PathBuf>,
    /// End as soon as the guest has connected to port 1024
    #[arg(long)]
    until_ready: bool,
}

/// Boots a machine, prints `ready <nanoseconds>` when the guest connects to port 1024 and
/// `ended <nanoseconds> <reason>` when it ends; both from just before this program is executed
/// again as the machine.
pub fn boot(options: &BootOptions) -> Result<()> {
    let open = |path: &PathBuf| File::open(path).with_context(|| path.display().to_string());
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
    let mut descriptors: Vec<OwnedFd> = vec![kvm.into(), open(&options.kernel)?.into()];
    let mut give = |descriptor: OwnedFd| {
        descriptors.push(descriptor);
        descriptors.len() - 1
    };
    let initrd = match &options.initrd {
        Some(path) => Some(give(open(path)?.into())),
        None => None,
    };
    let console = match &options.console {
        Some(path) => {
            let log = OpenOptions::new().create(true).append(true).open(path);
            Some(Console { log: give(log.context("console")?.into()), limit: CONSOLE_LIMIT })
        }
        None => None,
    };
    let mut files = None;
    let shared_folder = match &options.share {
        Some(path) => {
            let (server, ends) = serve_files(open(path)?)?;
            files = Some(server);
            let channels = ends.into_iter().map(|end| give(end.into())).collect();
            Some(SharedFolder { tag: SHARE_TAG.to_owned(), channels })
        }
        None => None,
    };
    let mut command_line = options.command_line.clone();
    for part in
        console.iter().map(|_| "console=ttyS0 8250.nr_uarts=1").chain(options.append.as_deref())
    {
        command_line.push(' ');
        command_line.push_str(part);
    }
    let config = BootConfig {
        kvm: 0,
        kernel: 1,
        initrd,
        command_line,
        vcpus: options.vcpus,
        memory_mib: options.memory,
        max_vcpus: options.max_vcpus,
        max_memory_mib: options.max_memory,
        console,
        shared_folder,
        network: Vec::new(),
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let (ours, theirs) = socket_pair()?;
    let start = Instant::now();
    let mut machine = role("machine", theirs)?;
    let requests =
        [MachineRequest::Boot(Box::new(config)), MachineRequest::Listen { port: AGENT_PORT }];
    for (id, request) in (1..).zip(requests) {
        let with = if id == 1 { &borrowed[..] } else { &[] };
        send(&ours, &Request { id, request }, with)?;
    }
    let result = follow(&ours, start, options.until_ready);
    drop(ours);
    machine.wait()?;
    // A file server ends when its control socket closes.
    if let Some((control, mut server)) = files {
        drop(control);
        server.wait()?;
    }
    result
}

/// Prints what the machine tells until it ends.
fn follow(socket: &OwnedFd, start: Instant, until_ready: bool) -> Result<()> {
    let mut streams = Vec::new();
    while let Some(mut packet) = receive::<MachineMessage>(socket)? {
        match &packet.message {
            MachineMessage::Reply { result: Err(error), id } => {
                if *id == 1 {
                    bail!("{error}");
                }
                eprintln!("request {id}: {error}");
            }
            MachineMessage::Reply { .. } => {}
            MachineMessage::Event(Event::Connection { .. }) => {
                println!("ready {}", start.elapsed().as_nanos());
                if until_ready {
                    return Ok(());
                }
                streams.push(packet.take(0)?);
            }
            MachineMessage::Event(Event::Ended { reason }) => {
                println!("ended {} {reason}", start.elapsed().as_nanos());
                return match reason {
                    EndReason::Failed { error } => bail!("{error}"),
                    _ => Ok(()),
                };
            }
        }
    }
    bail!("the machine has gone without a word")
}

/// Starts a file server on `folder`; its control socket, its process and the machine's channels.
fn serve_files(folder: File) -> Result<((OwnedFd, Child), Vec<UnixStream>)> {
    let (ours, theirs) = socket_pair()?;
    let server = role("files", theirs)?;
    let mut descriptors: Vec<OwnedFd> = vec![folder.into()];
    let mut ends = Vec::new();
    for _ in 0..CHANNELS {
        let (machine, files) = UnixStream::pair()?;
        ends.push(machine);
        descriptors.push(files.into());
    }
    let config = FilesConfig {
        folder: 0,
        channels: (1..=CHANNELS).collect(),
        vhost_user: None,
        volumes: None,
    };
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    send(&ours, &FilesRequest::Serve(config), &borrowed)?;
    match receive::<FilesMessage>(&ours)?.map(|packet| packet.message) {
        Some(FilesMessage::Serving) => Ok(((ours, server), ends)),
        Some(FilesMessage::Failed { error }) => bail!("files: {error}"),
        None => bail!("the file server has gone without a word"),
    }
}

/// Executes this program again in a role, with `control` as its control socket.
fn role(name: &str, control: OwnedFd) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(name);
    let descriptor = control.as_raw_fd();
    // SAFETY: dup2 and fcntl only, both async-signal-safe; the descriptor is open until the child
    // has been started, as `control` is dropped after that.
    unsafe {
        command.pre_exec(move || {
            let result = if descriptor == CONTROL_FD {
                libc::fcntl(descriptor, libc::F_SETFD, 0)
            } else {
                libc::dup2(descriptor, CONTROL_FD)
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let child = command.spawn().with_context(|| format!("husk-vmm {name}"))?;
    drop(control);
    Ok(child)
}
