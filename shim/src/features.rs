//! The OCI features, as the runtime specification's `features.md` has them: what Husk does of what a spec can
//! ask for. containerd 2.x announces of it to the kubelet what pods may ask for.

use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// How containerd names the message, whose value is JSON.
const TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Options of mounts that are carried out: on the host for binds, in the guest for the rest.
const MOUNT_OPTIONS: [&str; 33] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ro",
    "rprivate",
    "rro",
    "rrw",
    "rslave",
    "runbindable",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

/// Returns the features as containerd takes them.
pub fn message() -> Any {
    Any { type_url: TYPE.to_owned(), value: features().to_string().into_bytes(), ..Any::default() }
}

fn features() -> Value {
    let actions = ["ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP"];
    let operators = ["EQ", "GE", "GT", "LE", "LT", "MASKED_EQ", "NE"];
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
        ],
        "mountOptions": MOUNT_OPTIONS.as_slice(),
        "linux": {
            // No user namespace, and no idmapped mounts: a pod with `hostUsers: false` goes elsewhere.
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": actions.map(|name| format!("SCMP_ACT_{name}")),
                "operators": operators.map(|name| format!("SCMP_CMP_{name}")),
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
        },
        "potentiallyUnsafeConfigAnnotations": ["io.husk."],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_runtime::resource::MountOptions;
    use oci_spec::runtime::Features;

    #[test]
    fn only_what_is_done_is_announced() {
        let features: Features = serde_json::from_slice(&message().value).unwrap();
        let linux = features.linux().clone().unwrap();
        assert_eq!(linux.seccomp().as_ref().and_then(|seccomp| *seccomp.enabled()), Some(true));
        let value = features_of();
        assert!(!value["linux"]["namespaces"].as_array().unwrap().contains(&json!("user")));
        assert!(value["mountOptions"].as_array().unwrap().contains(&json!("rro")));
        let options: Vec<_> = MOUNT_OPTIONS.iter().map(|&option| option.to_owned()).collect();
        let parsed = MountOptions::parse(&options).unwrap();
        assert!(parsed.data.is_empty(), "unknown to the host's mounts: {:?}", parsed.data);
    }

    fn features_of() -> Value {
        serde_json::from_slice(&message().value).unwrap()
    }
}
