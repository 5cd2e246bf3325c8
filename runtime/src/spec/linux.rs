//! `linux`: namespaces, cgroup, devices, and what a machine of its own makes meaningless.

use std::collections::BTreeMap;

use husk_agent_protocols::SANDBOX_PID_NAMESPACE;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use super::Membership;
use super::error::{SpecError, refuse_if, refused};
use super::translate::some;
use super::{devices, resources};

/// What containers have of their own or share within their sandbox; the host's are out of reach,
/// and so is what the agent itself lives in.
const KINDS: [LinuxNamespaceType; 5] = [
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
    LinuxNamespaceType::Cgroup,
];

pub(super) fn translate(
    linux: &mut Linux,
    id: &str,
    membership: Membership,
) -> Result<(), SpecError> {
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
    let asked = linux.namespaces().clone().unwrap_or_default();
    linux.set_namespaces(Some(namespaces(&asked, membership)?));
    linux.set_cgroups_path(Some(format!("/husk/{id}").into()));
    // The guest's kernel has no SELinux.
    linux.set_mount_label(None);
    let mut limits = linux.resources().clone();
    let rules = limits.as_ref().and_then(|limits| limits.devices().clone()).unwrap_or_default();
    if let Some(list) = linux.devices_mut() {
        devices::translate(list, &rules)?;
    }
    if let Some(limits) = &mut limits {
        resources::translate_resources(limits)?;
    }
    linux.set_resources(limits);
    Ok(())
}

/// Takes out the parameters of what containers share with their sandbox.
pub(super) fn take_sandbox_sysctls(
    linux: &mut Linux,
    membership: Membership,
) -> BTreeMap<String, String> {
    let all = linux.sysctl().clone().unwrap_or_default();
    let (shared, own): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(name, _)| is_sandbox_sysctl(name, membership));
    if !shared.is_empty() {
        linux.set_sysctl(Some(own.into_iter().collect()));
    }
    shared.into_iter().collect()
}

/// Whether a kernel parameter belongs to the sandbox: those of the network always do, and in a pod
/// those of its IPC and UTS namespaces.
pub fn is_sandbox_sysctl(name: &str, membership: Membership) -> bool {
    let name = name.replace('/', ".");
    let shared = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.", "kernel.domainname"];
    name.starts_with("net.")
        || membership == Membership::Sandbox && shared.iter().any(|begin| name.starts_with(begin))
}

/// The network is the sandbox's, which is the guest's own: containers do not get another one. A pod
/// has one IPC and one UTS namespace, the sandbox's, which a container has that names none.
fn namespaces(
    asked: &[LinuxNamespace],
    membership: Membership,
) -> Result<Vec<LinuxNamespace>, SpecError> {
    for (number, namespace) in asked.iter().enumerate() {
        let reason = match namespace.typ() {
            LinuxNamespaceType::User => "a user namespace; the machine is the boundary",
            LinuxNamespaceType::Time => "a time namespace",
            _ => continue,
        };
        return Err(refused(format!("linux.namespaces[{number}]"), reason));
    }
    let mut made = Vec::new();
    for kind in KINDS {
        let own = asked.iter().find(|namespace| namespace.typ() == kind);
        let joins = own.is_none_or(|namespace| namespace.path().is_some());
        let shared = match membership {
            Membership::Alone => false,
            Membership::Sandbox => true,
            Membership::Member => joins,
        };
        let mut namespace = LinuxNamespaceBuilder::default().typ(kind);
        match kind {
            LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts if shared => continue,
            // All of a pod that share theirs share that of its first container.
            LinuxNamespaceType::Pid
                if membership == Membership::Member && own.is_some() && joins =>
            {
                namespace = namespace.path(SANDBOX_PID_NAMESPACE);
            }
            _ => {}
        }
        let namespace = namespace.build();
        made.push(namespace.map_err(|error| refused("linux.namespaces", error.to_string()))?);
    }
    Ok(made)
}
