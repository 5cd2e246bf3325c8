//! What can be set, and the defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::Size;

/// Every setting of Husk.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Configuration {
    /// `[machine]`: the virtual machine.
    pub machine: MachineSettings,
    /// `[guest]`: what runs in it.
    pub guest: GuestSettings,
    /// `[files]`: the file server.
    pub files: FileSettings,
    /// `[network]`: network devices.
    pub network: NetworkSettings,
    /// `[log]`: what is logged.
    pub log: LogSettings,
    /// `[annotations]`: what containers may set for themselves.
    pub annotations: AnnotationSettings,
    /// Where each key that is not at its default was set; for error messages.
    pub(crate) origins: BTreeMap<&'static str, String>,
}

/// `[machine]`: the virtual machine.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineSettings {
    /// The program `husk-vmm`.
    pub vmm: PathBuf,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory, whole MiB, at least [`MachineSettings::LEAST_MEMORY`].
    pub memory: Size,
    /// Whether limits of containers make a machine larger than `vcpus` and `memory`.
    pub grow: bool,
    /// Virtual CPUs that a machine can grow to, 1 to 32; 0 for as many as the host has, within
    /// reason.
    pub max_vcpus: u8,
    /// Memory that a machine can grow to, whole MiB; 0 for as much as the host has.
    pub max_memory: Size,
    /// What a machine has beside the memory that its containers may use.
    pub overhead: Size,
    /// Seconds within which the guest's agent must have called, 1 to 600.
    pub start_timeout: u16,
    /// Walls of the jail that this host may lack, of [`MachineSettings::WALLS`].
    pub accept_missing: Vec<String>,
}

impl MachineSettings {
    /// With less, the guest kernel has no room to unpack its initial RAM file system.
    pub const LEAST_MEMORY: Size = Size::from_mib(64);

    /// Walls of the jail that there can be a host without.
    pub const WALLS: [&str; 1] = ["landlock"];
}

/// `[guest]`: what runs in the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSettings {
    /// The guest kernel, an uncompressed ELF file.
    pub kernel: PathBuf,
    /// The initial RAM file system with the agent as `/init`.
    pub initrd: PathBuf,
    /// Appended to the guest kernel's command line.
    pub command_line_extra: String,
    /// Whether the guest has a serial console, logged to a file of the sandbox's.
    pub console: bool,
    /// Bytes of console output after which the rest is dropped.
    pub console_limit: Size,
    /// Whether `husk exec` may start a program in the guest itself.
    pub debug_shell: bool,
    /// That program: a static one on the host.
    pub debug_shell_program: PathBuf,
}

/// `[files]`: the file server.
#[derive(Debug, Clone, PartialEq)]
pub struct FileSettings {
    /// Requests served at the same time, 1 to 16.
    pub threads: u8,
}

/// `[network]`: network devices.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkSettings {
    /// Pairs of queues of each device, at most 8; 0: one for each virtual CPU.
    pub queues: u8,
    /// Whether frames pass through the host's kernel alone (vhost-net) where it can.
    pub vhost: bool,
    /// Bytes a second that each interface may receive; 0: no limit.
    pub receive_rate: Size,
    /// Bytes a second that each interface may send; 0: no limit.
    pub send_rate: Size,
    /// Frames a second that each interface may receive; 0: no limit.
    pub receive_packets: u32,
    /// Frames a second that each interface may send; 0: no limit.
    pub send_packets: u32,
    /// Whether rules in the network namespace that a guest's packets pass by are accepted.
    pub ignore_rules: bool,
}

/// `[log]`: what is logged.
#[derive(Debug, Clone, PartialEq)]
pub struct LogSettings {
    /// Lines less important than this are left out.
    pub level: LogLevel,
}

/// `[annotations]`: what containers may set for themselves.
#[derive(Debug, Clone, PartialEq)]
pub struct AnnotationSettings {
    /// Names after `io.husk.` that an annotation may set.
    pub allow: Vec<String>,
    /// Whether a container joins a sandbox that the CRI did not make, though only an annotation of its own
    /// places it there.
    pub join: bool,
}

/// How important a line of the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// The sandbox is lost.
    Critical,
    /// Something asked for was not done.
    Error,
    /// Done, but someone should look.
    Warning,
    /// The few steps of a container's life.
    Info,
    /// Every request.
    Debug,
}

impl LogLevel {
    /// From the most to the least important.
    pub const ALL: [Self; 5] =
        [Self::Critical, Self::Error, Self::Warning, Self::Info, Self::Debug];

    /// The name in the settings; `slog::Level` parses it too.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

impl Default for MachineSettings {
    fn default() -> Self {
        Self {
            vmm: "/usr/local/bin/husk-vmm".into(),
            vcpus: 1,
            memory: Size::from_mib(256),
            grow: true,
            max_vcpus: 0,
            max_memory: Size::from_mib(0),
            overhead: Size::from_mib(64),
            start_timeout: 10,
            accept_missing: Vec::new(),
        }
    }
}

impl Default for GuestSettings {
    fn default() -> Self {
        Self {
            kernel: "/usr/local/lib/husk/vmlinux".into(),
            initrd: "/usr/local/lib/husk/initrd.img".into(),
            command_line_extra: String::new(),
            console: false,
            console_limit: Size::from_mib(1),
            debug_shell: false,
            debug_shell_program: "/bin/busybox".into(),
        }
    }
}

impl Default for FileSettings {
    fn default() -> Self {
        Self { threads: 4 }
    }
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            queues: 0,
            vhost: true,
            receive_rate: Size::from_mib(0),
            send_rate: Size::from_mib(0),
            receive_packets: 0,
            send_packets: 0,
            ignore_rules: false,
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: LogLevel::Info }
    }
}

impl Default for AnnotationSettings {
    fn default() -> Self {
        Self { allow: ["console", "memory", "vcpus"].map(String::from).to_vec(), join: false }
    }
}
