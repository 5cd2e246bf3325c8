//! A container's root file system: containerd's list of mounts, made one over the other.

use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;

use super::detached::Detached;
use super::share::Point;
use super::{MountOptions, ResourceError, overlay};

/// One mount of a root file system, as a snapshotter describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// A folder inside the root file system; mostly empty.
    pub target: String,
    /// Options as text.
    pub options: Vec<String>,
}

/// A mounted root file system; dropping unmounts it.
#[derive(Debug)]
pub struct Rootfs {
    _point: Point,
}

impl Rootfs {
    /// Makes the mounts on `point`; what was made is undone if one fails.
    pub(super) fn mount(mounts: &[RootfsMount], mut point: Point) -> Result<Self, ResourceError> {
        for one in mounts {
            let inner = inner(&one.target)?;
            let options = MountOptions::parse(&one.options)?;
            // The layers are where containerd has mounted them.
            let host = point.share().sources().host().clone();
            let mount = host.within(|| make(one, &options));
            let attached = mount.and_then(|mount| match inner {
                "" => point.attach(mount),
                inner => point.attach_inside(inner, mount),
            });
            attached.map_err(|source| ResourceError::Mount {
                what: format!("{} {}", one.kind, one.source),
                target: point.path().join(inner),
                source,
            })?;
        }
        Ok(Self { _point: point })
    }
}

/// The folder inside the root file system that a mount's target names; empty for the root itself.
fn inner(target: &str) -> Result<&str, ResourceError> {
    let inner = target.trim_matches('/');
    if inner.split('/').any(|part| part == "..") {
        return Err(ResourceError::OutsideTarget(target.to_owned()));
    }
    Ok(inner)
}

fn make(one: &RootfsMount, options: &MountOptions) -> Result<Detached, Errno> {
    if options.flags.contains(MsFlags::MS_BIND) || one.kind == "bind" {
        return Detached::clone_at(Path::new(&one.source), options);
    }
    if one.kind == "overlay" {
        return overlay::mount(&one.source, options);
    }
    Detached::new(&one.kind, &one.source, options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apart::tests::with_own_mounts;
    use crate::resource::{Share, Sources};

    #[test]
    fn a_target_is_no_link_of_the_image() {
        with_own_mounts(|| {
            let place = husk_stage::Stage::new().unwrap();
            let image = place.path().join("image");
            std::fs::create_dir_all(image.join("real/deep")).unwrap();
            std::os::unix::fs::symlink("/etc", image.join("out")).unwrap();
            std::os::unix::fs::symlink("real", image.join("link")).unwrap();
            let share = Share::create(place.path().join("share"), Sources::default()).unwrap();
            let mount = |target: &str| {
                let one = |target: &str| RootfsMount {
                    kind: "bind".to_owned(),
                    source: image.to_string_lossy().into_owned(),
                    target: target.to_owned(),
                    options: Vec::new(),
                };
                let point = Point::folder(&share, "c".into()).unwrap();
                Rootfs::mount(&[one("/"), one(target)], point)
            };
            let rootfs = mount("/real/deep").unwrap();
            assert!(share.path().join("c/real/deep/real").is_dir());
            drop(rootfs);
            for target in ["out", "link/deep", "/out"] {
                let error = mount(target).unwrap_err();
                let ResourceError::Mount { source, .. } = error else { panic!("{error}") };
                assert_eq!(source, Errno::ELOOP, "{target}");
            }
            assert_eq!(std::fs::read_dir(share.path()).unwrap().count(), 0);
        });
    }

    #[test]
    fn a_target_outside_is_refused() {
        assert!(matches!(inner("/../../etc"), Err(ResourceError::OutsideTarget(_))));
        assert_eq!(inner("/var/lib/").unwrap(), "var/lib");
        assert_eq!(inner("/").unwrap(), "");
    }

    #[test]
    fn a_failing_mount_is_described() {
        let error = ResourceError::Mount {
            what: "overlay overlay".to_owned(),
            target: "/nowhere".into(),
            source: Errno::ENOENT,
        };
        let text = "cannot mount overlay overlay on /nowhere: no such file or directory";
        assert_eq!(crate::chain(&error), text);
    }
}
