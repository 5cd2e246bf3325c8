//! What the shim and `husk-vmm machine` say to each other.

use serde::{Deserialize, Serialize};

use crate::{NetworkDevice, NetworkMetrics};

/// The position of a descriptor among those that came with the same packet.
pub type Descriptor = usize;

/// A numbered request of the shim's; the answer carries the same number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the shim.
    pub id: u64,
    /// What is asked.
    pub request: MachineRequest,
}

/// What the shim asks of a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MachineRequest {
    /// Build the machine and let it run. Only once.
    Boot(Box<BootConfig>),
    /// Take connections of the guest's to this host port from now on. Each arrives as
    /// [`Event::Connection`] with the stream's descriptor. Ports never listened on are refused.
    Listen {
        /// The host port.
        port: u32,
    },
    /// Take the guest's next connection to this host port, once, over the stream socket that comes
    /// along. [`Event::Connection`] then carries no descriptor: the shim's end is its own, and no
    /// setting of this one (`O_NONBLOCK`) is shared with it.
    Accept {
        /// The host port.
        port: u32,
        /// The guest's port that the connection comes from; those from others are refused as if nobody
        /// listened. `None` takes it from any.
        from: Option<u32>,
        /// The machine's end of a pair.
        stream: Descriptor,
    },
    /// Stop taking connections to this host port.
    Unlisten {
        /// The host port.
        port: u32,
    },
    /// Connect to a port the guest listens on; [`Reply::Connected`] carries the stream.
    Connect {
        /// The guest's port.
        port: u32,
    },
    /// Stop the vCPUs where they are.
    Pause,
    /// Let stopped vCPUs go on.
    Resume,
    /// Counters since boot.
    Metrics,
    /// The guest has been told to power off: its next reset is the orderly end.
    ExpectEnd,
    /// Have so many virtual CPUs at least, at most [`BootConfig::max_vcpus`], for the guest to bring
    /// on line. There are never fewer again: one that the guest has taken off line stands still.
    EnsureVcpus {
        /// How many.
        count: u8,
    },
    /// Ask the guest to have so much memory, at most [`BootConfig::max_memory_mib`], in whole blocks;
    /// [`Reply::Memory`] comes at once. It never gets less than it was booted with.
    ResizeMemory {
        /// Guest memory in MiB, with what it was booted with.
        mib: u64,
    },
    /// Answered by [`Reply::Memory`] once the guest has as much memory as was asked for last. A
    /// further one ends the waiting of the one before with an error.
    AwaitMemory,
    /// Plug a network device into the running machine. The guest finds it when it looks for new
    /// devices on its PCI bus.
    AddNetwork(NetworkDevice),
    /// Unplug a network device. The guest should have let go of it before: it is not asked.
    RemoveNetwork {
        /// The device.
        id: String,
    },
    /// Tell the guest that a network device's link has come up or gone down.
    SetLink {
        /// The device.
        id: String,
        /// Whether frames pass.
        up: bool,
    },
}

/// What a machine is made of. Every resource is a descriptor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// `/dev/kvm`, opened read-write.
    pub kvm: Descriptor,
    /// The uncompressed ELF kernel, opened read-only.
    pub kernel: Descriptor,
    /// The initial RAM file system, opened read-only.
    pub initrd: Option<Descriptor>,
    /// The kernel's command line, without what the machine adds for its own devices.
    pub command_line: String,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs that there can be, at most 32. Those beyond `vcpus` are made when
    /// [`MachineRequest::EnsureVcpus`] asks for them. Fewer than `vcpus`: no more than those.
    #[serde(default)]
    pub max_vcpus: u8,
    /// Guest memory in MiB that there can be. Less than `memory_mib`: no more than that.
    #[serde(default)]
    pub max_memory_mib: u64,
    /// The serial console; absent, the guest has none.
    pub console: Option<Console>,
    /// The folder shared by virtio-fs.
    pub shared_folder: Option<SharedFolder>,
    /// Network devices the guest finds at boot.
    #[serde(default)]
    pub network: Vec<NetworkDevice>,
}

/// A serial console that only logs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// The log, opened for appending.
    pub log: Descriptor,
    /// Bytes after which the rest is dropped.
    pub limit: u64,
}

/// A virtio-fs device whose requests are answered by `husk-vmm files`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedFolder {
    /// The tag under which the guest mounts it; at most 36 bytes.
    pub tag: String,
    /// Courier channels: one UNIX stream socket each, one request at a time on each.
    pub channels: Vec<Descriptor>,
}

/// What a machine says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MachineMessage {
    /// The answer to the request of that number.
    Reply {
        /// The request's number.
        id: u64,
        /// What came of it; the error is text for the person at the terminal.
        result: Result<Reply, String>,
    },
    /// Something that happened by itself.
    Event(Event),
}

/// The answer to a request that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Done; nothing more to say.
    Done,
    /// The stream asked for by [`MachineRequest::Connect`]; one descriptor comes with it.
    Connected,
    /// The counters.
    Metrics(Metrics),
    /// How much memory the guest has.
    Memory(MemorySize),
}

/// How much memory a guest has and is to have, in MiB, with what it was booted with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySize {
    /// What it has been asked to have: whole blocks.
    pub requested_mib: u64,
    /// What it has.
    pub present_mib: u64,
    /// The device for it has just been added: the guest finds it when it looks for new devices on
    /// its PCI bus.
    pub added: bool,
}

/// Something that happened in a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The guest connected to a port listened on; one descriptor comes with it, unless the port was
    /// opened by [`MachineRequest::Accept`].
    Connection {
        /// The host port.
        port: u32,
    },
    /// The machine has ended, and its process is about to.
    Ended {
        /// Why.
        reason: EndReason,
    },
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum EndReason {
    /// The guest reset itself after [`MachineRequest::ExpectEnd`].
    PoweredOff,
    /// The guest reset itself unasked.
    Reset,
    /// The guest's kernel panicked (told by pvpanic).
    Panicked,
    /// A vCPU shut down: a triple fault.
    TripleFault,
    /// The machine's process was sent SIGTERM.
    Terminated,
    /// The machine itself failed.
    Failed {
        /// What failed.
        error: String,
    },
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::Panicked => f.write_str("the guest kernel panicked"),
            Self::TripleFault => f.write_str("the guest ended in a triple fault"),
            Self::Terminated => f.write_str("the machine process was ended by SIGTERM"),
            Self::Failed { error } => write!(f, "the machine failed: {error}"),
        }
    }
}

/// Counters of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Exits of vCPUs to user space.
    pub exits: u64,
    /// Streams of the vsock device that are open now.
    pub vsock_streams: u64,
    /// Bytes from the guest over vsock.
    pub vsock_from_guest: u64,
    /// Bytes to the guest over vsock.
    pub vsock_to_guest: u64,
    /// FUSE requests carried.
    pub fuse_requests: u64,
    /// Virtual CPUs there are.
    #[serde(default)]
    pub vcpus: u64,
    /// MiB of memory the guest has.
    #[serde(default)]
    pub memory_mib: u64,
    /// The network devices there are.
    #[serde(default)]
    pub network: Vec<NetworkMetrics>,
}
