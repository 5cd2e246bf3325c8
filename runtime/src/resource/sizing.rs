//! The machine's size: the settings', or more where the limits of what runs in it ask for more.

use std::collections::BTreeMap;

use husk_configuration::Configuration;
use nix::sys::sysinfo::sysinfo;
use nix::unistd::{SysconfVar, sysconf};
use oci_spec::runtime::LinuxResources;

const MIB: u64 = 1 << 20;

/// No machine has more virtual CPUs.
const MOST_VCPUS: u64 = 32;

/// How many virtual CPUs there is room for if the settings do not say. A guest with room for a second
/// starts sooner than one without; each further one costs its start, and some of its memory.
const USUAL_ROOM: (u8, u8) = (2, 8);

/// Limits from here on mean that there is none.
const NO_LIMIT: u64 = 1 << 46;

/// The kernel's own period, which holds where only a quota is set.
const PERIOD: u64 = 100_000;

/// containerd's annotations of a pod's sandbox with what its containers may use together.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// How large a machine is, or is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// What a container, or a pod, may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Microseconds of processor time in each period.
    quota: Option<u64>,
    /// Microseconds; the kernel's own if it is not set.
    period: Option<u64>,
}

impl Limits {
    /// From bytes, and microseconds of processor time in each period; zero and less is no limit.
    pub fn new(memory: Option<i64>, quota: Option<i64>, period: Option<u64>) -> Self {
        let mut limits = Self::default();
        limits.set(memory, quota, period.filter(|period| *period > 0));
        limits
    }

    /// Those of a container.
    pub fn of_container(resources: &LinuxResources) -> Self {
        let mut limits = Self::default();
        limits.change(resources);
        limits
    }

    /// Those of a pod.
    pub fn of_pod(annotations: &BTreeMap<String, String>) -> Self {
        let number = |name| annotations.get(name).and_then(|text: &String| text.parse().ok());
        let period = number(POD_PERIOD).and_then(|period: i64| u64::try_from(period).ok());
        let mut limits = Self::default();
        limits.set(number(POD_MEMORY), number(POD_QUOTA), period);
        limits
    }

    /// Takes over what `resources` names; the rest stays.
    pub fn change(&mut self, resources: &LinuxResources) {
        let cpu = resources.cpu().as_ref();
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        self.set(memory, cpu.and_then(|cpu| cpu.quota()), cpu.and_then(|cpu| cpu.period()));
    }

    /// 0 names nothing, and a negative number takes a limit away.
    fn set(&mut self, memory: Option<i64>, quota: Option<i64>, period: Option<u64>) {
        let positive = |value: i64| u64::try_from(value).ok();
        if let Some(memory) = memory.filter(|memory| *memory != 0) {
            self.memory = positive(memory).filter(|bytes| *bytes < NO_LIMIT);
        }
        if let Some(quota) = quota.filter(|quota| *quota != 0) {
            self.quota = positive(quota);
        }
        if let Some(period) = period.filter(|period| *period != 0) {
            self.period = Some(period);
        }
    }

    /// Thousandths of a processor.
    fn processors(&self) -> u64 {
        let quota = self.quota.unwrap_or(0).min(u64::MAX / 1000);
        (quota * 1000).div_ceil(self.period.unwrap_or(PERIOD))
    }
}

/// How the size of a machine follows from limits.
#[derive(Debug, Clone)]
pub struct SizingRules {
    /// What the settings say: never less.
    least: Sizing,
    /// What it can grow to.
    most: Sizing,
    overhead_mib: u64,
    /// Of all of a pod, as far as that is said when it is made.
    pod: Limits,
    vcpus_follow: bool,
    memory_follows: bool,
}

impl SizingRules {
    /// By the settings. `pod` are the limits of a pod as a whole.
    pub fn new(configuration: &Configuration, pod: Limits) -> Self {
        let machine = &configuration.machine;
        let follows = |key| machine.grow && !configuration.is_annotated(key);
        let least = Sizing { vcpus: machine.vcpus, memory_mib: machine.memory.mib() };
        let most = Sizing {
            vcpus: if machine.max_vcpus == 0 { host_processors() } else { machine.max_vcpus },
            memory_mib: match machine.max_memory.mib() {
                0 => host_memory_mib(),
                mib => mib,
            },
        };
        Self {
            least,
            most,
            overhead_mib: machine.overhead.mib(),
            pod,
            vcpus_follow: follows("machine.vcpus"),
            memory_follows: follows("machine.memory"),
        }
    }

    /// How large the machine is to be for containers with these limits: for what they may use
    /// together, or the pod as a whole if that is more. What an annotation says holds as it is.
    pub fn size<'a>(&self, limits: impl IntoIterator<Item = &'a Limits>) -> Sizing {
        let (mut memory, mut processors) = (0_u64, 0_u64);
        for limits in limits {
            memory = memory.saturating_add(limits.memory.unwrap_or(0));
            processors = processors.saturating_add(limits.processors());
        }
        let mut size = self.least;
        let memory = memory.max(self.pod.memory.unwrap_or(0));
        if memory > 0 && self.memory_follows {
            size.memory_mib = size.memory_mib.max(memory.div_ceil(MIB) + self.overhead_mib);
        }
        let processors = processors.max(self.pod.processors()).div_ceil(1000);
        if self.vcpus_follow {
            // At most 32.
            let wanted = u8::try_from(processors.min(MOST_VCPUS)).unwrap_or(u8::MAX);
            size.vcpus = size.vcpus.max(wanted);
        }
        size
    }

    /// How large a machine can become that is booted with this size.
    pub fn room(&self, booted: Sizing) -> Sizing {
        let most = |follows, most, booted| if follows { most } else { booted };
        let vcpus = most(self.vcpus_follow, self.most.vcpus.into(), booted.vcpus.into());
        let memory_mib = most(self.memory_follows, self.most.memory_mib, booted.memory_mib);
        Sizing {
            vcpus: u8::try_from(vcpus).unwrap_or(booted.vcpus).max(booted.vcpus),
            memory_mib: memory_mib.max(booted.memory_mib),
        }
    }
}

/// As many as are on line, within [`USUAL_ROOM`].
fn host_processors() -> u8 {
    let (least, most) = USUAL_ROOM;
    let count = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(1);
    u8::try_from(count).unwrap_or(most).clamp(least, most)
}

fn host_memory_mib() -> u64 {
    sysinfo().map_or(0, |host| host.ram_total() / MIB)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn container(resources: serde_json::Value) -> Limits {
        Limits::of_container(&serde_json::from_value(resources).unwrap())
    }

    fn limits(memory: i64, quota: i64) -> Limits {
        container(json!({
            "memory": {"limit": memory}, "cpu": {"quota": quota, "period": 100_000},
        }))
    }

    fn rules(pod: Limits) -> SizingRules {
        SizingRules::new(&Configuration::default(), pod)
    }

    fn size(limits: Limits) -> (u8, u64) {
        let size = rules(Limits::default()).size([&limits]);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn limits_make_a_machine_larger_and_never_smaller() {
        assert_eq!(size(Limits::default()), (1, 256));
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
    fn a_change_names_only_some_limits() {
        let mut changed = limits(1 << 30, 250_000);
        let mut change = |resources| {
            changed.change(&serde_json::from_value(resources).unwrap());
            size(changed)
        };
        assert_eq!(change(json!({"cpu": {"period": 50_000}})), (5, 1024 + 64));
        assert_eq!(change(json!({"cpu": {"quota": 0, "period": 0}})), (5, 1024 + 64));
        assert_eq!(change(json!({"memory": {"limit": 2_i64 << 30}})), (5, 2048 + 64));
        assert_eq!(change(json!({"pids": {"limit": 5}})), (5, 2048 + 64));
        assert_eq!(change(json!({"cpu": {"quota": -1}})), (1, 2048 + 64));
        assert_eq!(change(json!({"memory": {"limit": -1}})), (1, 256));
    }

    #[test]
    fn containers_of_a_pod_count_together() {
        let [a, b] = [limits(512 << 20, 50_000), limits(1 << 30, 60_000)];
        let none = Limits::default();
        let both = rules(none).size([&a, &none, &b]);
        assert_eq!(both, Sizing { vcpus: 2, memory_mib: 1536 + 64 });
        // Half a processor and half a processor are one.
        assert_eq!(rules(none).size([&a, &a]).vcpus, 1);
        let huge = limits(1 << 45, i64::MAX);
        assert_eq!(rules(none).size([&huge; 5]).vcpus, 32);
        // The pod's own limits hold from the start to the end.
        let pod = rules(limits(1 << 30, 300_000));
        assert_eq!(pod.size([]), Sizing { vcpus: 3, memory_mib: 1024 + 64 });
        assert_eq!(pod.size([&a]), Sizing { vcpus: 3, memory_mib: 1024 + 64 });
        assert_eq!(pod.size([&a, &b]), Sizing { vcpus: 3, memory_mib: 1536 + 64 });
    }

    #[test]
    fn a_pods_limits_are_its_annotations() {
        let pod = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            let size = rules(Limits::of_pod(&pairs.collect())).size([]);
            (size.vcpus, size.memory_mib)
        };
        let (memory, quota) = ((POD_MEMORY, "536870912"), (POD_QUOTA, "150000"));
        assert_eq!(pod(&[memory, quota, (POD_PERIOD, "100000")]), (2, 512 + 64));
        assert_eq!(pod(&[quota]), (2, 256));
        assert_eq!(pod(&[(POD_MEMORY, "much"), (POD_PERIOD, "-5")]), (1, 256));
    }

    #[test]
    fn what_is_said_outright_holds() {
        let annotations = BTreeMap::from([("io.husk.memory".to_owned(), "300MiB".to_owned())]);
        let annotated = Configuration::default().with_annotations(&annotations).unwrap();
        let limits = limits(1 << 30, 200_000);
        let rules = SizingRules::new(&annotated, Limits::default());
        let size = Sizing { vcpus: 2, memory_mib: 300 };
        assert_eq!(rules.size([&limits]), size);
        assert_eq!(rules.room(size).memory_mib, 300);
        let mut fixed = Configuration::default();
        fixed.machine.grow = false;
        fixed.machine.max_vcpus = 8;
        let rules = SizingRules::new(&fixed, limits);
        let size = Sizing { vcpus: 1, memory_mib: 256 };
        assert_eq!((rules.size([&limits]), rules.room(size)), (size, size));
    }

    #[test]
    fn there_is_room_for_what_the_settings_say_or_the_host_has() {
        let mut configuration = Configuration::default();
        let small = Sizing { vcpus: 1, memory_mib: 256 };
        let host = SizingRules::new(&configuration, Limits::default()).room(small);
        assert!((2..=8).contains(&host.vcpus) && host.memory_mib > 256, "{host:?}");
        configuration.machine.max_vcpus = 4;
        configuration.machine.max_memory = husk_configuration::Size::from_mib(1024);
        let rules = SizingRules::new(&configuration, Limits::default());
        assert_eq!(rules.room(small), Sizing { vcpus: 4, memory_mib: 1024 });
        let large = Sizing { vcpus: 6, memory_mib: 2048 };
        assert_eq!(rules.room(large), large, "no less than it is booted with");
    }
}
