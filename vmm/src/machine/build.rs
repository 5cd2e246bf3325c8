//! Makes a machine out of its configuration and its descriptors.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;

use husk_control::{BootConfig, Packet, PacketError, Request};
use kvm_bindings::CpuId;
use slog::{Logger, info};

use super::devices::{Devices, Virtio};
use super::memory::Growth;
use super::network::{NetworkError, NetworkParts, Networks};
use super::plug::PlugError;
use super::{Control, EndSignal, Machine};
use crate::arch::x86_64::{self, BootParams, CommandLineError, MpTableError};
use crate::bus::BusError;
use crate::bus::pci::{ConfigSpaceError, PciError};
use crate::devices::legacy::LimitedLog;
use crate::devices::virtio::fs::FsError;
use crate::devices::virtio::vsock::Vsock;
use crate::vcpu::{BootEntry, VcpuError};
use crate::vm::{
    self, BlockRange, GuestMemory, InitrdError, InterruptChips, Kernel, KernelError, Kvm,
    KvmBlocks, KvmError, LiveMemory, MemoryError,
};

const MAX_VCPUS: u8 = 32;
const MIB: u64 = 1 << 20;

/// Of a processor that does not say.
const LEAST_ADDRESS_BITS: u32 = 36;

/// Bytes of stack for the thread that reads kernel and initrd.
const LOADER_STACK: usize = 256 << 10;

/// Why a machine cannot be built. The texts go to the person at the terminal.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A descriptor the message named did not come.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// None or too many.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// More than the guest was told of.
    #[error("{wanted} vCPUs were asked for, and this machine can have {most}")]
    TooManyVcpus {
        /// How many were asked for.
        wanted: u8,
        /// How many there can be.
        most: u8,
    },
    /// Nothing to grow by.
    #[error("this machine was built to have {0} MiB of memory and no more")]
    FixedMemory(u64),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM file system.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// A table in guest memory.
    #[error("the tables for the guest's start could not be written")]
    Tables(#[from] vm_memory::GuestMemoryError),
    /// The MP table.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// The machine's own devices clash.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A function's configuration space.
    #[error(transparent)]
    ConfigSpace(#[from] ConfigSpaceError),
    /// A virtio device's place on the bus.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// The shared folder.
    #[error("the shared folder")]
    Fs(#[from] FsError),
    /// A network device.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A fault of ours.
    #[error("loading the kernel panicked")]
    Panic,
    /// A descriptor.
    #[error("a descriptor could not be made")]
    Descriptor(#[from] io::Error),
}

/// The descriptors of a machine.
pub struct Resources {
    kvm: OwnedFd,
    kernel: File,
    initrd: Option<File>,
    console: Option<(File, u64)>,
    shared_folder: Option<(String, Vec<OwnedFd>)>,
    network: Vec<NetworkParts>,
}

impl Resources {
    /// Takes the descriptors that came with the request.
    pub fn take(packet: &mut Packet<Request>, config: &BootConfig) -> Result<Self, PacketError> {
        let mut file = |position| packet.take(position).map(File::from);
        let kernel = file(config.kernel)?;
        let initrd = config.initrd.map(&mut file).transpose()?;
        let console = match &config.console {
            Some(console) => Some((file(console.log)?, console.limit)),
            None => None,
        };
        let shared_folder = match &config.shared_folder {
            Some(folder) => {
                let take = |&position: &usize| packet.take(position);
                let channels = folder.channels.iter().map(take).collect::<Result<_, _>>()?;
                Some((folder.tag.clone(), channels))
            }
            None => None,
        };
        let parts = |device| NetworkParts::take(packet, device);
        let network = config.network.iter().map(parts).collect::<Result<_, _>>()?;
        Ok(Self { kvm: packet.take(config.kvm)?, kernel, initrd, console, shared_folder, network })
    }
}

/// Builds the machine. Its devices get into the event loop when [`Machine::settle`] is called.
pub fn build(
    config: &BootConfig,
    resources: Resources,
    vsock: Arc<Mutex<Vsock>>,
    control: Arc<Control>,
    end: Arc<EndSignal>,
    logger: &Logger,
) -> Result<Machine, BuildError> {
    let max_vcpus = config.max_vcpus.max(config.vcpus);
    if config.vcpus == 0 || max_vcpus > MAX_VCPUS {
        return Err(BuildError::Vcpus(if config.vcpus == 0 { 0 } else { max_vcpus }));
    }
    let command_line = command_line(config);
    x86_64::check_command_line(&command_line)?;
    let kernel = Kernel::open(resources.kernel)?;
    let memory = vm::allocate(config.memory_mib)?;
    let kvm = Kvm::new(resources.kvm)?;
    // To make a virtual machine is mostly to wait for the host's kernel (it moves a thread of its own
    // into our cgroup, which takes it an RCU grace period), so memory is filled meanwhile.
    let (vm, entry) = thread::scope(|scope| {
        // A stack of the usual size would be filled with a huge page.
        let loader = thread::Builder::new().name("loader".to_owned()).stack_size(LOADER_STACK);
        let load = || load(config, &command_line, &kernel, resources.initrd, &memory);
        let loading = loader.spawn_scoped(scope, load)?;
        let vm = kvm.create_vm(chips(config));
        Ok::<_, BuildError>((vm, loading.join().unwrap_or(Err(BuildError::Panic))))
    })?;
    // First what is more likely to be wrong, and the user's to mend.
    let entry = entry?;
    let mut vm = vm?;
    vm.add_memory(memory.clone())?;

    let mut devices = Devices::new(&end)?;
    let serial = match resources.console {
        Some((log, limit)) => Some(devices.add_serial(&vm, LimitedLog::new(log, limit))?),
        None => None,
    };
    let more = config.max_memory_mib.saturating_sub(config.memory_mib).saturating_mul(MIB);
    let range = BlockRange::above(&memory, more, address_bits(vm.cpuid()));
    let memory = LiveMemory::new(memory);
    let plug = devices.plug(&vm, memory.clone());
    let mut virtio = Virtio::new(&plug, logger);
    virtio.add_vsock(vsock.clone())?;
    let fs = match resources.shared_folder {
        Some((tag, channels)) => Some(virtio.add_fs(&tag, channels)?),
        None => None,
    };
    virtio.add_rng()?;
    let memory = range.map(|range| {
        let blocks = KvmBlocks::new(vm.fd().clone(), memory, range);
        Growth::new(blocks, control, config.memory_mib, logger)
    });
    let networks = Networks::default();
    for parts in resources.network {
        networks.add(parts, &plug, true, logger)?;
    }
    let shared = Arc::new(devices.finish(&vm, end)?);

    let machine = Machine {
        vcpus: RefCell::new(Vec::with_capacity(usize::from(max_vcpus))),
        running: Cell::new(false),
        shared,
        serial,
        vsock,
        fs,
        memory,
        memory_mib: config.memory_mib,
        max_vcpus,
        entry,
        networks,
        plug,
        logger: logger.clone(),
        vm,
    };
    machine.ensure_vcpus(config.vcpus)?;
    info!(logger, "machine: built"; "vcpus" => config.vcpus, "memory_mib" => config.memory_mib);
    Ok(machine)
}

/// What was asked for, and how many processors the kernel is to start by itself if there can be more.
fn command_line(config: &BootConfig) -> String {
    let mut text = config.command_line.clone();
    if config.max_vcpus > config.vcpus {
        text.push_str(&format!(" maxcpus={}", config.vcpus));
    }
    text
}

/// How many bits a guest-physical address has (CPUID 0x80000008).
fn address_bits(cpuid: &CpuId) -> u32 {
    let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 0x8000_0008);
    leaf.map_or(LEAST_ADDRESS_BITS, |leaf| leaf.eax & 0xff)
}

/// Only the console has an interrupt line.
fn chips(config: &BootConfig) -> InterruptChips {
    match config.console {
        Some(_) => InterruptChips::Pins,
        None => InterruptChips::None,
    }
}

/// Puts kernel, initrd and tables into memory.
fn load(
    config: &BootConfig,
    command_line: &str,
    kernel: &Kernel,
    initrd: Option<File>,
    memory: &GuestMemory,
) -> Result<BootEntry, BuildError> {
    let size = match &initrd {
        Some(file) => file.metadata().map_err(InitrdError::Read)?.len(),
        None => 0,
    };
    kernel.load(memory, size)?;
    let initrd =
        initrd.map(|file| vm::load_initrd(memory, &file, size, kernel.end())).transpose()?;
    let params = BootParams { command_line, initrd };
    x86_64::write_boot_params(memory, &params)?;
    x86_64::write_boot_tables(memory)?;
    let processors = config.max_vcpus.max(config.vcpus);
    x86_64::write_mp_table(memory, processors, chips(config) == InterruptChips::Pins)?;
    Ok(BootEntry { address: kernel.entry() })
}
