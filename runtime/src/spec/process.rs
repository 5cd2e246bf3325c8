//! `process`: of a container's init, and of processes added later.

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process};
use rustix::process::{Resource, getrlimit};

use super::error::{SpecError, refuse_if, refused};

/// Every limit that a process has.
const LIMITS: [(PosixRlimitType, Resource); 16] = [
    (PosixRlimitType::RlimitCpu, Resource::Cpu),
    (PosixRlimitType::RlimitFsize, Resource::Fsize),
    (PosixRlimitType::RlimitData, Resource::Data),
    (PosixRlimitType::RlimitStack, Resource::Stack),
    (PosixRlimitType::RlimitCore, Resource::Core),
    (PosixRlimitType::RlimitRss, Resource::Rss),
    (PosixRlimitType::RlimitNproc, Resource::Nproc),
    (PosixRlimitType::RlimitNofile, Resource::Nofile),
    (PosixRlimitType::RlimitMemlock, Resource::Memlock),
    (PosixRlimitType::RlimitAs, Resource::As),
    (PosixRlimitType::RlimitLocks, Resource::Locks),
    (PosixRlimitType::RlimitSigpending, Resource::Sigpending),
    (PosixRlimitType::RlimitMsgqueue, Resource::Msgqueue),
    (PosixRlimitType::RlimitNice, Resource::Nice),
    (PosixRlimitType::RlimitRtprio, Resource::Rtprio),
    (PosixRlimitType::RlimitRttime, Resource::Rttime),
];

/// Translates a process in place; `field` is its name in messages. Limits that it does not name are
/// containerd's, which the shim has inherited and never changes.
pub fn translate_process(process: &mut Process, field: &str) -> Result<(), SpecError> {
    let empty = process.args().as_ref().is_none_or(Vec::is_empty);
    refuse_if(empty, &format!("{field}.args"), "there is no command to run")?;
    let affinity = process.exec_cpu_affinity().is_some();
    let reason = "the host's CPU numbers mean nothing in the guest";
    refuse_if(affinity, &format!("{field}.execCPUAffinity"), reason)?;
    // The guest's kernel has no security modules; the machine is the boundary.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    let mut limits = process.rlimits().clone().unwrap_or_default();
    for (kind, resource) in LIMITS {
        if !limits.iter().any(|limit| limit.typ() == kind) {
            limits.push(inherited(kind, resource)?);
        }
    }
    process.set_rlimits(Some(limits));
    Ok(())
}

/// Returns the limit that this process has.
fn inherited(kind: PosixRlimitType, resource: Resource) -> Result<PosixRlimit, SpecError> {
    let own = getrlimit(resource);
    let [soft, hard] = [own.current, own.maximum].map(|limit| limit.unwrap_or(u64::MAX));
    let limit = PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build();
    limit.map_err(|error| refused("process.rlimits", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_that_are_not_named_are_inherited() {
        let named = json!([{ "type": "RLIMIT_CORE", "soft": 7, "hard": 8 }]);
        for (rlimits, core) in [(json!([]), None), (named, Some((7, 8)))] {
            let process = json!({
                "user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/", "rlimits": rlimits,
            });
            let mut process: Process = serde_json::from_value(process).unwrap();
            translate_process(&mut process, "process").unwrap();
            let limits = process.rlimits().clone().unwrap();
            assert_eq!(limits.len(), LIMITS.len());
            for (kind, resource) in LIMITS {
                let own = getrlimit(resource);
                let own = (own.current.unwrap_or(u64::MAX), own.maximum.unwrap_or(u64::MAX));
                let wanted = core.filter(|_| kind == PosixRlimitType::RlimitCore).unwrap_or(own);
                let limit = limits.iter().find(|limit| limit.typ() == kind).unwrap();
                assert_eq!((limit.soft(), limit.hard()), wanted, "{kind}");
            }
        }
    }
}
