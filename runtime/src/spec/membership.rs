//! What a container is to its sandbox.

use std::collections::BTreeMap;

/// Annotations that say what a container is to its pod, and the pod that it belongs to.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// What a container is to its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// All there is in it: every namespace is its own.
    Alone,
    /// The pod's first, whose IPC and UTS namespaces are the sandbox's.
    Sandbox,
    /// One of a pod: it shares what it asks for by path.
    Member,
}

impl Membership {
    /// Of the container `id` with these annotations.
    pub fn of(id: &str, annotations: &BTreeMap<String, String>) -> Self {
        let kind = KINDS.iter().find_map(|name| annotations.get(*name));
        match (kind.map(String::as_str), sandbox_of(annotations)) {
            (Some("sandbox"), _) => Self::Sandbox,
            (_, Some(sandbox)) if sandbox != id => Self::Member,
            _ => Self::Alone,
        }
    }
}

/// The sandbox that the annotations name, if they do.
pub fn sandbox_of(annotations: &BTreeMap<String, String>) -> Option<&str> {
    let named = SANDBOXES.iter().find_map(|name| annotations.get(*name));
    named.map(String::as_str).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_say_what_a_container_is() {
        let of = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            Membership::of("c", &pairs.collect())
        };
        assert_eq!(of(&[]), Membership::Alone);
        assert_eq!(of(&[("io.kubernetes.cri.container-type", "sandbox")]), Membership::Sandbox);
        assert_eq!(of(&[("io.kubernetes.cri-o.ContainerType", "sandbox")]), Membership::Sandbox);
        let member = ("io.kubernetes.cri.container-type", "container");
        assert_eq!(of(&[member, ("io.kubernetes.cri.sandbox-id", "s")]), Membership::Member);
        assert_eq!(of(&[("io.kubernetes.cri-o.SandboxID", "s")]), Membership::Member);
        assert_eq!(of(&[("io.kubernetes.cri.sandbox-id", "c")]), Membership::Alone);
        assert_eq!(of(&[("io.kubernetes.cri.sandbox-id", "")]), Membership::Alone);
    }
}
