//! The machine's size: the settings', or more where the limits of what runs in it ask for more.

use std::collections::BTreeMap;

use husk_configuration::Configuration;
use oci_spec::runtime::LinuxResources;

const MIB: u64 = 1 << 20;

/// No machine has more virtual CPUs.
const MOST_VCPUS: u64 = 32;

/// Limits from here on mean that there is none.
const NO_LIMIT: u64 = 1 << 46;

/// containerd's annotations of a pod's sandbox with what its containers may use together.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// How large a machine is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// What a sandbox's containers may use together, as far as that is known when it is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Whole processors, rounded up.
    pub processors: Option<u64>,
}

impl Limits {
    fn new(memory: Option<i64>, quota: Option<i64>, period: Option<u64>) -> Self {
        let positive = |value: Option<i64>| value.and_then(|v| u64::try_from(v).ok());
        let memory = positive(memory).filter(|bytes| (1..NO_LIMIT).contains(bytes));
        let period = period.filter(|period| *period > 0);
        let processors = positive(quota).filter(|quota| *quota > 0).zip(period);
        Self { memory, processors: processors.map(|(quota, period)| quota.div_ceil(period)) }
    }

    /// Those of a container that has its sandbox for itself.
    pub fn of_container(resources: &LinuxResources) -> Self {
        let cpu = resources.cpu().as_ref();
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        // The kernel's own period holds where only a quota is set.
        let period = cpu.map(|cpu| cpu.period().unwrap_or(100_000));
        Self::new(memory, cpu.and_then(|cpu| cpu.quota()), period)
    }

    /// Those of a pod.
    pub fn of_pod(annotations: &BTreeMap<String, String>) -> Self {
        let number = |name| annotations.get(name).and_then(|text: &String| text.parse().ok());
        let period = number(POD_PERIOD).and_then(|period: i64| u64::try_from(period).ok());
        Self::new(number(POD_MEMORY), number(POD_QUOTA), period)
    }
}

/// How large the machine is to be. Never smaller than the settings say; and if an annotation says so,
/// exactly as large.
pub fn sizing(configuration: &Configuration, limits: Limits) -> Sizing {
    let machine = &configuration.machine;
    let fixed = |key| !machine.grow || configuration.is_annotated(key);
    let mut size = Sizing { vcpus: machine.vcpus, memory_mib: machine.memory.mib() };
    if let Some(bytes) = limits.memory.filter(|_| !fixed("machine.memory")) {
        let wanted = bytes.div_ceil(MIB) + machine.overhead.mib();
        size.memory_mib = size.memory_mib.max(wanted);
    }
    if let Some(processors) = limits.processors.filter(|_| !fixed("machine.vcpus")) {
        // At most 32.
        let wanted = u8::try_from(processors.min(MOST_VCPUS)).unwrap_or(u8::MAX);
        size.vcpus = size.vcpus.max(wanted);
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn container(resources: serde_json::Value) -> Limits {
        Limits::of_container(&serde_json::from_value(resources).unwrap())
    }

    fn size(limits: Limits) -> (u8, u64) {
        let size = sizing(&Configuration::default(), limits);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn limits_make_a_machine_larger_and_never_smaller() {
        assert_eq!(size(Limits::default()), (1, 256));
        let limits = |memory: i64, quota: i64| {
            container(json!({
                "memory": {"limit": memory}, "cpu": {"quota": quota, "period": 100_000},
            }))
        };
        assert_eq!(size(limits(1 << 30, 250_000)), (3, 1024 + 64));
        assert_eq!(size(limits(64 << 20, 50_000)), (1, 256));
        // A limit on processors alone leaves the memory as it is.
        assert_eq!(size(limits(0, 400_000)), (4, 256));
        assert_eq!(size(limits(-1, -1)), (1, 256));
        assert_eq!(size(limits(i64::MAX, i64::MAX)), (32, 256));
        assert_eq!(size(container(json!({"cpu": {"quota": 200_000}}))), (2, 256));
        assert_eq!(size(container(json!({"cpu": {"shares": 4096}}))), (1, 256));
    }

    #[test]
    fn a_pods_limits_are_its_annotations() {
        let pod = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            size(Limits::of_pod(&pairs.collect()))
        };
        let (memory, quota) = ((POD_MEMORY, "536870912"), (POD_QUOTA, "150000"));
        assert_eq!(pod(&[memory, quota, (POD_PERIOD, "100000")]), (2, 512 + 64));
        assert_eq!(pod(&[quota]), (1, 256));
        assert_eq!(pod(&[(POD_MEMORY, "much"), (POD_PERIOD, "-5")]), (1, 256));
    }

    #[test]
    fn what_is_said_outright_holds() {
        let annotations = BTreeMap::from([("io.husk.memory".to_owned(), "300MiB".to_owned())]);
        let annotated = Configuration::default().with_annotations(&annotations).unwrap();
        let limits = Limits { memory: Some(1 << 30), processors: Some(2) };
        assert_eq!(sizing(&annotated, limits), Sizing { vcpus: 2, memory_mib: 300 });
        let mut fixed = Configuration::default();
        fixed.machine.grow = false;
        assert_eq!(sizing(&fixed, limits), Sizing { vcpus: 1, memory_mib: 256 });
    }
}
