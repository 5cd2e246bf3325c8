//! What the containers of a pod find in `/etc` and `/dev/shm` where no engine lays it out for them.
//!
//! An engine that starts a pod with a pause container makes these files itself and mounts them into
//! each container. One that asks the shim for a sandbox leaves both to the shim.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{Mode, OFlags};

use crate::resource::{Memory, ResourceError, is_bind};
use crate::spec::Membership;

/// The files by their names in `/etc`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcFiles(pub Vec<(&'static str, String)>);

/// Bytes of the files together, those included that the guest adds to them.
const BYTES: u64 = 1 << 20;

/// The folder and the files, with some of the room that extended attributes take.
const FILES: u64 = 64;

/// The files, written on a file system of their own: the guest may write to them. Dropping removes them.
#[derive(Debug)]
pub(super) struct WrittenEtc {
    files: Memory,
    names: Vec<&'static str>,
}

impl WrittenEtc {
    /// Writes the files into a new folder, in the calling thread's mount namespace.
    pub(super) fn write(folder: PathBuf, files: &EtcFiles) -> Result<Self, ResourceError> {
        let mut written = Self { files: Memory::create(folder, BYTES, FILES)?, names: Vec::new() };
        for (name, text) in &files.0 {
            written.names.push(name);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o644);
            rustix::fs::openat(written.files.root(), *name, flags, mode)
                .map_err(io::Error::from)
                .and_then(|file| File::from(file).write_all(text.as_bytes()))
                .map_err(|source| ResourceError::Place { path: written.path_of(name), source })?;
        }
        Ok(written)
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Mounts into the pod's container `id` what its spec mounts nothing on.
    pub(super) fn complete(&self, id: &str, spec: &mut Spec) {
        let annotations = spec.annotations().clone().unwrap_or_default();
        if Membership::of(id, &annotations.into_iter().collect()) != Membership::Member {
            return;
        }
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true));
        let access = if read_only { "ro" } else { "rw" };
        for name in &self.names {
            let target = Path::new("/etc").join(name);
            if !mounts.iter().any(|mount| *mount.destination() == target) {
                mounts.push(bind(&target, &self.path_of(name), &["rbind", "rprivate", access]));
            }
        }
        if shares_memory(spec) {
            let target = Path::new("/dev/shm");
            // What engines have there by default is memory of the container's own.
            mounts.retain(|mount| mount.destination() != target || is_bind(mount));
            if !mounts.iter().any(|mount| mount.destination() == target) {
                let options = ["rbind", "nosuid", "noexec", "nodev"];
                // The source stands for the pod's memory in the guest.
                mounts.push(bind(target, target, &options));
            }
        }
        spec.set_mounts(Some(mounts));
    }
}

/// Whether a container has the IPC namespace of its pod.
fn shares_memory(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let own = namespaces.into_iter().flatten().find(|one| one.typ() == LinuxNamespaceType::Ipc);
    own.is_none_or(|namespace| namespace.path().is_some())
}

fn bind(target: &Path, source: &Path, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(target.to_path_buf())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_path_buf()))
        .set_options(Some(options.iter().map(|&option| option.to_owned()).collect()));
    mount
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apart::tests::with_own_mounts;
    use serde_json::{Value, json};

    fn completed(written: &WrittenEtc, namespaces: &Value) -> Vec<(String, String)> {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs", "readonly": true},
            "annotations": {"io.kubernetes.cri.sandbox-id": "pod"},
            "mounts": [
                {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts",
                 "options": ["rbind"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            ],
            "linux": {"namespaces": namespaces},
        }))
        .unwrap();
        written.complete("c", &mut spec);
        let mounts = spec.mounts().clone().unwrap();
        let pair = |mount: &Mount| {
            let source = mount.source().as_ref().unwrap().display().to_string();
            (mount.destination().display().to_string(), source)
        };
        mounts.iter().map(pair).collect()
    }

    #[test]
    fn what_the_engine_left_out_is_mounted_and_nothing_else() {
        with_own_mounts(|| {
            let place = husk_stage::Stage::new().unwrap();
            let folder = place.path().join("etc");
            let files = EtcFiles(vec![("hosts", "h".to_owned()), ("hostname", "pod\n".to_owned())]);
            let written = WrittenEtc::write(folder.clone(), &files).unwrap();
            let hostname = folder.join("hostname");
            assert_eq!(std::fs::read_to_string(&hostname).unwrap(), "pod\n");
            let pair = |target: &str, source: &str| (target.to_owned(), source.to_owned());
            let name = pair("/etc/hostname", hostname.to_str().unwrap());
            let hosts = pair("/etc/hosts", "/kubelet/hosts");
            let shared = completed(&written, &json!([{"type": "ipc", "path": "/proc/5/ns/ipc"}]));
            assert_eq!(shared, [hosts.clone(), name.clone(), pair("/dev/shm", "/dev/shm")]);
            let own = completed(&written, &json!([{"type": "ipc"}]));
            assert_eq!(own, [hosts, pair("/dev/shm", "shm"), name]);
            drop(written);
            assert!(!folder.exists());
        });
    }

    #[test]
    fn a_guest_fills_its_own_room_only() {
        with_own_mounts(|| {
            let place = husk_stage::Stage::new().unwrap();
            let files = EtcFiles(vec![("hosts", "h".to_owned())]);
            let written = WrittenEtc::write(place.path().join("etc"), &files).unwrap();
            let filled = std::fs::write(place.path().join("etc/hosts"), vec![0; 2 << 20]);
            assert_eq!(filled.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            drop(written);
        });
    }

    #[test]
    fn a_container_that_is_in_no_pod_stays_as_it_is() {
        with_own_mounts(|| {
            let place = husk_stage::Stage::new().unwrap();
            let files = EtcFiles(vec![("hosts", String::new())]);
            let written = WrittenEtc::write(place.path().join("etc"), &files).unwrap();
            let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0"})).unwrap();
            let before = spec.clone();
            written.complete("c", &mut spec);
            assert_eq!(spec, before);
        });
    }
}
