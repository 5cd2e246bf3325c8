//! The host's CPUs and memory nodes that containers may use, as `linux.resources.cpu` names them.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use oci_spec::runtime::LinuxResources;

/// No kernel for x86 counts further (`CONFIG_NR_CPUS`, `MAX_NUMNODES`).
const MOST: u32 = 8192;

/// The error of a list of CPUs or memory nodes that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {text:?} is no list of numbers below {MOST} and of ranges of them, such as 0-3,8")]
pub struct CpusetError {
    field: &'static str,
    text: String,
}

/// Numbers of CPUs or memory nodes; displayed as the kernel reads them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers(BTreeSet<u32>);

impl FromStr for Numbers {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut numbers = BTreeSet::new();
        for part in text.split(',').map(str::trim) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number < MOST);
            let (first, last) = (number(first).ok_or(())?, number(last).ok_or(())?);
            if first > last {
                return Err(());
            }
            numbers.extend(first..=last);
        }
        Ok(Self(numbers))
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, number) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{number}")?;
        }
        Ok(())
    }
}

/// CPUs and memory nodes; `None` is all that there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpuset {
    /// CPUs.
    pub cpus: Option<Numbers>,
    /// Memory nodes.
    pub mems: Option<Numbers>,
}

impl Cpuset {
    /// Returns the set that a container's `resources` name.
    pub fn of(resources: &LinuxResources) -> Result<Self, CpusetError> {
        let mut set = Self::default();
        set.change(resources)?;
        Ok(set)
    }

    /// Takes over what `resources` names; the rest stays. An empty text names nothing.
    pub fn change(&mut self, resources: &LinuxResources) -> Result<(), CpusetError> {
        let Some(cpu) = resources.cpu() else { return Ok(()) };
        for (field, text, numbers) in [
            ("linux.resources.cpu.cpus", cpu.cpus(), &mut self.cpus),
            ("linux.resources.cpu.mems", cpu.mems(), &mut self.mems),
        ] {
            if let Some(text) = text.as_deref().filter(|text| !text.trim().is_empty()) {
                let read = text.parse();
                *numbers = Some(read.map_err(|()| CpusetError { field, text: text.to_owned() })?);
            }
        }
        Ok(())
    }

    /// Returns what containers with these sets use together.
    pub fn union<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        let both = |one: Option<Numbers>, other: &Option<Numbers>| match (one, other) {
            (Some(one), Some(other)) => Some(Numbers(one.0.union(&other.0).copied().collect())),
            _ => None,
        };
        let mut sets = sets.into_iter();
        let first = sets.next().cloned().unwrap_or_default();
        sets.fold(first, |all, set| Self {
            cpus: both(all.cpus, &set.cpus),
            mems: both(all.mems, &set.mems),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(cpus: &str, mems: &str) -> Result<Cpuset, CpusetError> {
        let resources = json!({"cpu": {"cpus": cpus, "mems": mems}});
        Cpuset::of(&serde_json::from_value(resources).unwrap())
    }

    fn shown(numbers: Option<Numbers>) -> Option<String> {
        numbers.map(|numbers| numbers.to_string())
    }

    #[test]
    fn lists_are_read_as_the_kernel_does() {
        let read = set("0-2,5, 7-7", "").unwrap();
        assert_eq!((shown(read.cpus), read.mems), (Some("0,1,2,5,7".to_owned()), None));
        for bad in ["x", "1-", "3-2", "8192", "0-4294967295", "1,,2", "-1", "0-3:1/2"] {
            let error = set(bad, "").unwrap_err().to_string();
            assert!(error.contains("linux.resources.cpu.cpus") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn together_they_may_use_what_any_may() {
        let union = Cpuset::union(&[set("0-1", "0").unwrap(), set("1,4", "1").unwrap()]);
        assert_eq!(shown(union.cpus).as_deref(), Some("0,1,4"));
        assert_eq!(shown(union.mems).as_deref(), Some("0,1"));
        let union = Cpuset::union(&[set("0-1", "0").unwrap(), set("", "0").unwrap()]);
        assert_eq!((union.cpus, shown(union.mems).as_deref()), (None, Some("0")));
        assert_eq!(Cpuset::union(&[]), Cpuset::default());
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut now = set("0-1", "0").unwrap();
        let resources = serde_json::from_value(json!({"cpu": {"cpus": "3"}})).unwrap();
        now.change(&resources).unwrap();
        assert_eq!(
            (shown(now.cpus).as_deref(), shown(now.mems).as_deref()),
            (Some("3"), Some("0"))
        );
    }
}
