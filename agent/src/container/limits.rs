//! Room in the guest's kernel for the limits of a process.

use std::fs;

use oci_spec::runtime::{PosixRlimitType, Process};

use crate::host::Host;

/// The largest bound on descriptors that a kernel takes.
const MOST_DESCRIPTORS: u64 = 0x7fff_ffc0;

/// Raises the guest's `fs.nr_open` to the descriptors that `process` may have: the host's may be larger than
/// the kernel's default. What cannot be raised fails by name when the limit is set.
pub fn make_room(host: &Host, process: &Process) {
    let limits = process.rlimits().iter().flatten();
    let descriptors = limits.filter(|limit| limit.typ() == PosixRlimitType::RlimitNofile);
    let Some(wanted) = descriptors.map(|limit| limit.hard().max(limit.soft())).max() else {
        return;
    };
    let path = host.parameters().join("fs/nr_open");
    let now = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
    if now.is_some_and(|now: u64| now < wanted) && wanted <= MOST_DESCRIPTORS {
        let _ = fs::write(&path, wanted.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn room_is_made_for_more_descriptors_and_never_taken_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let host = Host::Directory(folder.path().to_owned());
        let file = host.parameters().join("fs/nr_open");
        fs::create_dir_all(host.parameters().join("fs")).expect("made");
        for (hard, expected) in [
            (1_u64 << 10, "1048576"),
            (1_073_741_816, "1073741816"),
            (1 << 20, "1073741816"),
            (u64::MAX, "1073741816"),
        ] {
            if !file.exists() {
                fs::write(&file, "1048576\n").expect("written");
            }
            let limit = json!([{ "type": "RLIMIT_NOFILE", "soft": 5, "hard": hard }]);
            let process = json!({
                "user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/", "rlimits": limit,
            });
            make_room(&host, &serde_json::from_value(process).expect("a process"));
            assert_eq!(fs::read_to_string(&file).expect("read").trim(), expected, "{hard}");
        }
    }
}
