//! The machine's size, from the settings and the annotations laid over them.

use husk_configuration::Configuration;

/// How large a machine is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// How large the settings want the machine.
pub fn sizing(configuration: &Configuration) -> Sizing {
    Sizing { vcpus: configuration.machine.vcpus, memory_mib: configuration.machine.memory.mib() }
}
