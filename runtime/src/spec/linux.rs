//! `linux`: namespaces, cgroup, devices, and what a machine of its own makes meaningless.

use std::collections::BTreeMap;

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use super::error::{SpecError, refuse_if, refused};
use super::translate::some;
use super::{devices, resources};

/// Every container has its own of these, whether the host's or a fresh one was asked for: the
/// host's are out of reach, and the guest's belong to the agent.
const FRESH: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Cgroup,
];

pub(super) fn translate(linux: &mut Linux, id: &str) -> Result<(), SpecError> {
    let no_users = "user namespaces; the machine is the boundary";
    refuse_if(some(linux.uid_mappings()), "linux.uidMappings", no_users)?;
    refuse_if(some(linux.gid_mappings()), "linux.gidMappings", no_users)?;
    let offsets = linux.time_offsets().as_ref().is_some_and(|map| !map.is_empty());
    refuse_if(offsets, "linux.timeOffsets", "time namespaces")?;
    let hardware = "it sets hardware of the host's";
    refuse_if(linux.intel_rdt().is_some(), "linux.intelRdt", hardware)?;
    refuse_if(linux.memory_policy().is_some(), "linux.memoryPolicy", hardware)?;
    let moved = linux.net_devices().as_ref().is_some_and(|map| !map.is_empty());
    refuse_if(moved, "linux.netDevices", "it moves interfaces of the host's")?;
    if let Some(seccomp) = linux.seccomp() {
        let listener = seccomp.listener_path().is_some();
        let reason = "its socket is on the host, out of the guest's reach";
        refuse_if(listener, "linux.seccomp.listenerPath", reason)?;
    }
    linux.set_namespaces(Some(namespaces(linux.namespaces().as_deref().unwrap_or_default())?));
    linux.set_cgroups_path(Some(format!("/husk/{id}").into()));
    // The guest's kernel has no SELinux.
    linux.set_mount_label(None);
    let mut limits = linux.resources().clone();
    let rules = limits.as_ref().and_then(|limits| limits.devices().clone()).unwrap_or_default();
    if let Some(list) = linux.devices_mut() {
        devices::translate(list, &rules)?;
    }
    if let Some(limits) = &mut limits {
        resources::translate(limits)?;
    }
    linux.set_resources(limits);
    Ok(())
}

/// Takes out the parameters of the network namespace: containers share the sandbox's.
pub(super) fn take_network_sysctls(linux: &mut Linux) -> BTreeMap<String, String> {
    let all = linux.sysctl().clone().unwrap_or_default();
    let (network, own): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(name, _)| is_network_sysctl(name));
    if !network.is_empty() {
        linux.set_sysctl(Some(own.into_iter().collect()));
    }
    network.into_iter().collect()
}

/// Whether a kernel parameter belongs to the network namespace.
pub fn is_network_sysctl(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

/// The network is the sandbox's, which is the guest's own: containers do not get another one.
fn namespaces(asked: &[LinuxNamespace]) -> Result<Vec<LinuxNamespace>, SpecError> {
    for (number, namespace) in asked.iter().enumerate() {
        let reason = match namespace.typ() {
            LinuxNamespaceType::User => "a user namespace; the machine is the boundary",
            LinuxNamespaceType::Time => "a time namespace",
            _ => continue,
        };
        return Err(refused(format!("linux.namespaces[{number}]"), reason));
    }
    FRESH
        .into_iter()
        .map(|kind| {
            LinuxNamespaceBuilder::default()
                .typ(kind)
                .build()
                .map_err(|error| refused("linux.namespaces", error.to_string()))
        })
        .collect()
}
