//! The control sockets between the shim and the two roles of `husk-vmm`.
//!
//! Both roles inherit one end of a UNIX `SOCK_SEQPACKET` pair as descriptor [`CONTROL_FD`]. A packet
//! is one JSON message of at most [`MAX_PACKET`] bytes; descriptors travel beside it (`SCM_RIGHTS`)
//! and are named in the message by their position. Nothing else is handed to the process: neither
//! role opens a path. The peer closing the socket means "end now".
//!
//! The shim treats every answer as hostile: unknown fields, oversized packets and descriptor
//! positions out of range are errors, never panics.

mod files;
mod machine;
mod network;
mod packet;

pub use files::{FilesConfig, FilesMessage, FilesRequest, VolumeRules};
pub use machine::{
    BootConfig, Console, EndReason, Event, MachineMessage, MachineRequest, MemorySize, Metrics,
    Reply, Request, SharedFolder,
};
pub use network::{NetworkDevice, NetworkMetrics, RateLimit, TokenBucket};
pub use packet::{Packet, PacketError, receive, send, socket_pair};

/// The descriptor on which a role of `husk-vmm` finds its control socket.
pub const CONTROL_FD: std::os::fd::RawFd = 3;

/// The longest JSON message, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// The most descriptors one packet may carry: as many as the kernel takes (`SCM_MAX_FD`). A network
/// interface needs two for each pair of its queues.
pub const MAX_DESCRIPTORS: usize = 253;

/// The extended attribute of the shared folder by which the guest's agent asks its file server how long
/// something may still be believed that the guest's kernel was told of names and attributes: nanoseconds as
/// a little-endian `i64`, negative if nothing has been since. Only a process with `CAP_SYS_ADMIN` over the
/// guest can ask for `trusted.` attributes. The runtime tells the agent this name.
pub const VALIDITY_ATTRIBUTE: &str = "trusted.husk.validity";

/// The extended attribute of a file or folder by which the guest's agent announces an operation on it that
/// the file server is to answer as if it were done: words that are each ended by NUL. `create`, `remove` or
/// `remove-folder` and a name, `rename` or `rename-folder` and two, or `change`; empty after the operation.
/// The server answers `EALREADY`. The runtime tells the agent this name.
pub const REPEAT_ATTRIBUTE: &str = "trusted.husk.repeat";

/// The context id of the host in vsock addresses.
pub const HOST_CID: u64 = 2;

/// The context id of every guest: a machine has only its own, so it need not be unique per host.
pub const GUEST_CID: u64 = 3;

/// The command line for Husk's own guest kernel; the runtime adds what its settings say.
///
/// `reboot=k` resets by the keyboard controller, the machine's one reset line; `panic=-1` does so at
/// once after a panic, which pvpanic has reported by then. `8250.nr_uarts=0` and `quiet`: no serial
/// port is looked for. `pci=conf1`: no other way to configuration space is tried. `tsc=reliable` and
/// `no_timer_check`: neither clock nor timer is watched against hardware that is not there.
pub const DEFAULT_COMMAND_LINE: &str = "reboot=k panic=-1 quiet loglevel=1 8250.nr_uarts=0 pci=conf1 \
     tsc=reliable no_timer_check random.trust_cpu=on random.trust_bootloader=on \
     dummy.numdummies=0 ifb.numifbs=0 cryptomgr.notests rcupdate.rcu_expedited=1";
