//! What a container uses, as containerd's cgroup v2 metrics.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use husk_runtime::container::{InterfaceUse, Statistics};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// The name under which containerd and its clients know the message.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// No guest has more disks.
const MOST_DISKS: usize = 256;

/// No guest has more interfaces, nor longer names for them.
const MOST_INTERFACES: usize = 256;
const LONGEST_INTERFACE: usize = 16;

/// Counters that a kernel does not have are zero, as with runc.
pub(super) fn metrics(used: Statistics) -> Any {
    let pids = PidsStat {
        current: used.pids_current,
        limit: bounded(used.pids_max),
        ..Default::default()
    };
    let disks = used.io_stat.into_iter().take(MOST_DISKS);
    let usage = disks.map(|disk| {
        let count = counters(&disk.counters);
        IOEntry {
            major: disk.major,
            minor: disk.minor,
            rbytes: count("rbytes"),
            wbytes: count("wbytes"),
            rios: count("rios"),
            wios: count("wios"),
            ..Default::default()
        }
    });
    let io = IOStat { usage: usage.collect(), ..Default::default() };
    let memory = MemoryStat {
        usage: used.memory_current,
        usage_limit: used.memory_max,
        swap_usage: used.swap_current,
        swap_limit: used.swap_max,
        ..memory(&used.memory_stat)
    };
    let interfaces = used.interfaces.into_iter().take(MOST_INTERFACES);
    let metrics = Metrics {
        pids: Some(pids).into(),
        cpu: Some(cpu(&used.cpu_stat)).into(),
        memory: Some(memory).into(),
        memory_events: Some(memory_events(&used.memory_events)).into(),
        io: Some(io).into(),
        network: interfaces.map(interface).collect(),
        ..Default::default()
    };
    // Cannot fail: the message has no required fields.
    let value = metrics.write_to_bytes().unwrap_or_default();
    Any { type_url: TYPE.to_owned(), value, ..Any::default() }
}

fn interface(used: InterfaceUse) -> NetworkStat {
    NetworkStat {
        name: used.name.chars().take(LONGEST_INTERFACE).collect(),
        rx_bytes: used.received_bytes,
        rx_packets: used.received_packets,
        rx_errors: used.received_errors,
        rx_dropped: used.received_dropped,
        tx_bytes: used.sent_bytes,
        tx_packets: used.sent_packets,
        tx_errors: used.sent_errors,
        tx_dropped: used.sent_dropped,
        ..Default::default()
    }
}

fn counters(counters: &HashMap<String, u64>) -> impl Fn(&str) -> u64 {
    |name| counters.get(name).copied().unwrap_or(0)
}

/// runc's shim says 0 where there is no limit on processes.
fn bounded(limit: u64) -> u64 {
    if limit == u64::MAX { 0 } else { limit }
}

fn cpu(stat: &HashMap<String, u64>) -> CPUStat {
    let count = counters(stat);
    CPUStat {
        usage_usec: count("usage_usec"),
        user_usec: count("user_usec"),
        system_usec: count("system_usec"),
        nr_periods: count("nr_periods"),
        nr_throttled: count("nr_throttled"),
        throttled_usec: count("throttled_usec"),
        nr_bursts: count("nr_bursts"),
        burst_usec: count("burst_usec"),
        ..Default::default()
    }
}

fn memory(stat: &HashMap<String, u64>) -> MemoryStat {
    let count = counters(stat);
    let both =
        |name: &str| count(&format!("{name}_anon")).saturating_add(count(&format!("{name}_file")));
    MemoryStat {
        anon: count("anon"),
        file: count("file"),
        kernel_stack: count("kernel_stack"),
        slab: count("slab"),
        sock: count("sock"),
        shmem: count("shmem"),
        file_mapped: count("file_mapped"),
        file_dirty: count("file_dirty"),
        file_writeback: count("file_writeback"),
        anon_thp: count("anon_thp"),
        inactive_anon: count("inactive_anon"),
        active_anon: count("active_anon"),
        inactive_file: count("inactive_file"),
        active_file: count("active_file"),
        unevictable: count("unevictable"),
        slab_reclaimable: count("slab_reclaimable"),
        slab_unreclaimable: count("slab_unreclaimable"),
        pgfault: count("pgfault"),
        pgmajfault: count("pgmajfault"),
        // Newer kernels count these for files and for anonymous memory apart.
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: count("workingset_nodereclaim"),
        pgrefill: count("pgrefill"),
        pgscan: count("pgscan"),
        pgsteal: count("pgsteal"),
        pgactivate: count("pgactivate"),
        pgdeactivate: count("pgdeactivate"),
        pglazyfree: count("pglazyfree"),
        pglazyfreed: count("pglazyfreed"),
        thp_fault_alloc: count("thp_fault_alloc"),
        thp_collapse_alloc: count("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn memory_events(events: &HashMap<String, u64>) -> MemoryEvents {
    let count = counters(events);
    MemoryEvents {
        low: count("low"),
        high: count("high"),
        max: count("max"),
        oom: count("oom"),
        oom_kill: count("oom_kill"),
        oom_group_kill: count("oom_group_kill"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_find_their_fields() {
        let named = |name: &str, count| HashMap::from([(name.to_owned(), count)]);
        let used = Statistics {
            cpu_stat: named("usage_usec", 5),
            memory_stat: named("anon", 6),
            memory_events: named("oom_kill", 7),
            interfaces: vec![InterfaceUse {
                name: "eth0".to_owned(),
                received_bytes: 10,
                sent_dropped: 11,
                ..InterfaceUse::default()
            }],
            memory_current: 8,
            memory_max: 9,
            pids_current: 1,
            pids_max: u64::MAX,
            ..Statistics::default()
        };
        let any = metrics(used);
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let read = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(read.cpu.usage_usec, 5);
        assert_eq!((read.memory.anon, read.memory.usage, read.memory.usage_limit), (6, 8, 9));
        assert_eq!(read.memory_events.oom_kill, 7);
        let eth0 = &read.network[0];
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.tx_dropped), ("eth0", 10, 11));
        assert_eq!((read.pids.current, read.pids.limit), (1, 0));
    }
}
