//! CPUs and memory nodes of the host's on which a sandbox runs: all that its containers may use together.
//! The pause container's count only while it is alone, as the kubelet places none.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::lock::lock;
use crate::resource::Cpuset;

/// The sets of a sandbox's containers.
#[derive(Debug)]
pub(super) struct Cpusets {
    own: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sets: HashMap<String, Cpuset>,
    together: Cpuset,
}

impl Cpusets {
    /// For the sandbox `own`.
    pub(super) fn new(own: &str) -> Self {
        Self { own: own.to_owned(), state: Mutex::default() }
    }

    /// Returns a container's set.
    pub(super) fn get(&self, id: &str) -> Option<Cpuset> {
        lock(&self.state).sets.get(id).cloned()
    }

    /// Notes a container's set, or that it has gone; returns what all may use together, if that is not what
    /// it was.
    pub(super) fn put(&self, id: &str, set: Option<Cpuset>) -> Option<Cpuset> {
        let mut state = lock(&self.state);
        match set {
            Some(set) => state.sets.insert(id.to_owned(), set),
            // The sandbox's own stays known: its pod may be alone again.
            None if id == self.own => None,
            None => state.sets.remove(id),
        };
        let alone = state.sets.keys().all(|id| *id == self.own);
        let members = state.sets.iter().filter(|(id, _)| alone || **id != self.own);
        let together = Cpuset::union(members.map(|(_, set)| set));
        if together == state.together {
            return None;
        }
        state.together.clone_from(&together);
        Some(together)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_container_counts_only_alone() {
        let set = |cpus: &str| Cpuset { cpus: cpus.parse().ok(), mems: None };
        let sets = Cpusets::new("pause");
        assert_eq!(sets.put("pause", Some(set(""))), None);
        assert_eq!(sets.put("a", Some(set("2"))), Some(set("2")));
        assert_eq!(sets.put("b", Some(set("3"))), Some(set("2-3")));
        assert_eq!(sets.put("a", Some(set("3"))), Some(set("3")));
        assert_eq!(sets.put("a", None), None);
        assert_eq!(sets.put("b", None), Some(set("")));
    }
}
