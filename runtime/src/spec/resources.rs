//! `linux.resources`: limits hold in the guest as far as its kernel has them.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxResources};

use super::error::{SpecError, refuse_if};
use super::translate::some;

/// Translates limits in place; what they mean on the host only is refused or left out.
pub fn translate_resources(resources: &mut LinuxResources) -> Result<(), SpecError> {
    if let Some(memory) = resources.memory_mut() {
        translate_memory(memory)?;
    }
    if let Some(cpu) = resources.cpu_mut() {
        translate_cpu(cpu)?;
    }
    if let Some(io) = resources.block_io() {
        refuse_disks(io)?;
    }
    // A weight only divides a disk, and the guest has none.
    resources.set_block_io(None);
    // Kubernetes sends a limit of 0 for every size the host has.
    let pages = resources.hugepage_limits().iter().flatten().any(|limit| limit.limit() != 0);
    let reason = "the guest has no huge pages";
    refuse_if(pages, "linux.resources.hugepageLimits", reason)?;
    resources.set_hugepage_limits(None);
    if let Some(network) = resources.network() {
        refuse_network(network)?;
    }
    resources.set_network(None);
    let rdma = resources.rdma().as_ref().is_some_and(|map| !map.is_empty());
    refuse_if(rdma, "linux.resources.rdma", "it limits devices of the host's")
}

fn translate_memory(memory: &mut LinuxMemory) -> Result<(), SpecError> {
    let reason = "cgroup v2 always lets the killer in";
    let disabled = memory.disable_oom_killer() == Some(true);
    refuse_if(disabled, "linux.resources.memory.disableOOMKiller", reason)?;
    memory.set_disable_oom_killer(None);
    // None at all, which the agent's library takes for a change of the swap's limit too.
    if memory.limit().is_some_and(|limit| limit < 0) {
        memory.set_limit(Some(i64::MAX));
    }
    // The guest has no swap, and cgroup v2 no limits of its own for the kernel's memory.
    memory.set_swap(None);
    memory.set_swappiness(None);
    memory.set_kernel(None);
    memory.set_kernel_tcp(None);
    memory.set_use_hierarchy(None);
    memory.set_check_before_update(None);
    Ok(())
}

fn translate_cpu(cpu: &mut LinuxCpu) -> Result<(), SpecError> {
    let reason = "cgroup v2 has no limits for real-time scheduling";
    let runtime = cpu.realtime_runtime().is_some_and(|runtime| runtime != 0);
    refuse_if(runtime, "linux.resources.cpu.realtimeRuntime", reason)?;
    let period = cpu.realtime_period().is_some_and(|period| period != 0);
    refuse_if(period, "linux.resources.cpu.realtimePeriod", reason)?;
    cpu.set_realtime_runtime(None);
    cpu.set_realtime_period(None);
    // Numbers of the host's CPUs and memory nodes, to which the sandbox is confined there.
    cpu.set_cpus(None);
    cpu.set_mems(None);
    Ok(())
}

fn refuse_disks(io: &LinuxBlockIo) -> Result<(), SpecError> {
    let reason = "the host's disk numbers mean nothing in the guest";
    for (name, asked) in [
        ("weightDevice", some(io.weight_device())),
        ("throttleReadBpsDevice", some(io.throttle_read_bps_device())),
        ("throttleWriteBpsDevice", some(io.throttle_write_bps_device())),
        ("throttleReadIOPSDevice", some(io.throttle_read_iops_device())),
        ("throttleWriteIOPSDevice", some(io.throttle_write_iops_device())),
    ] {
        refuse_if(asked, &format!("linux.resources.blockIO.{name}"), reason)?;
    }
    Ok(())
}

fn refuse_network(network: &LinuxNetwork) -> Result<(), SpecError> {
    let reason = "cgroup v2 has no network controllers";
    let class = network.class_id().is_some_and(|id| id != 0);
    refuse_if(class, "linux.resources.network.classID", reason)?;
    refuse_if(some(network.priorities()), "linux.resources.network.priorities", reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_than_nothing_is_no_limit_of_memory() {
        for (asked, limit) in [(-1, i64::MAX), (1 << 20, 1 << 20), (0, 0)] {
            let json = serde_json::json!({"memory": {"limit": asked, "swap": -1}});
            let mut resources: LinuxResources = serde_json::from_value(json).unwrap();
            translate_resources(&mut resources).unwrap();
            let memory = resources.memory().as_ref().unwrap();
            assert_eq!((memory.limit(), memory.swap()), (Some(limit), None));
        }
    }
}
