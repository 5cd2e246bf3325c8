//! A container's root file system: containerd's list of mounts, made one over the other.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{SysconfVar, chdir, sysconf};

use super::{MountOptions, ResourceError};
use crate::apart::apart;

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
    mounted: Vec<PathBuf>,
}

impl Rootfs {
    /// Makes the mounts on `target`; what was made is undone if one fails.
    pub fn mount(mounts: &[RootfsMount], target: &Path) -> Result<Self, ResourceError> {
        let mut rootfs = Self { mounted: Vec::new() };
        for one in mounts {
            let target = match one.target.trim_start_matches('/') {
                "" => target.to_path_buf(),
                inner if inner.split('/').any(|part| part == "..") => {
                    return Err(ResourceError::OutsideTarget(one.target.clone()));
                }
                inner => target.join(inner),
            };
            mount_one(one, &target)?;
            rootfs.mounted.push(target);
        }
        Ok(rootfs)
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            // Lazily: the file server may hold files open for another moment.
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}

fn mount_one(one: &RootfsMount, target: &Path) -> Result<(), ResourceError> {
    let options = MountOptions::parse(&one.options)?;
    let fail = |source| ResourceError::Mount {
        what: format!("{} {}", one.kind, one.source),
        target: target.to_path_buf(),
        source,
    };
    if options.flags.contains(MsFlags::MS_BIND) || one.kind == "bind" {
        return bind(Path::new(&one.source), target, &options).map_err(fail);
    }
    let data = options.data();
    // The kernel takes one page of options.
    if one.kind == "overlay" && data.len() >= page_size() {
        return mount_long_overlay(one, target, &options).map_err(fail);
    }
    mount(
        Some(one.source.as_str()),
        target,
        Some(one.kind.as_str()),
        options.flags,
        Some(data.as_str()),
    )
    .map_err(fail)
}

/// Binds `source` to `target`, with the flags that a second call must set.
pub(super) fn bind(source: &Path, target: &Path, options: &MountOptions) -> Result<(), Errno> {
    let none = None::<&str>;
    let recursive = options.flags & MsFlags::MS_REC;
    mount(Some(source), target, none, MsFlags::MS_BIND | recursive, none)?;
    let flags = options.flags.difference(MsFlags::MS_BIND | MsFlags::MS_REC);
    if flags.is_empty() {
        return Ok(());
    }
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(none, target, none, flags, none).inspect_err(|_| {
        let _ = umount2(target, MntFlags::MNT_DETACH);
    })
}

/// An overlay of many layers: the paths are shortened by mounting from their common folder, in a
/// thread with a working folder of its own.
fn mount_long_overlay(
    one: &RootfsMount,
    target: &Path,
    options: &MountOptions,
) -> Result<(), Errno> {
    let (folder, data) = shorten(&options.data).ok_or(Errno::E2BIG)?;
    apart(|| {
        unshare(CloneFlags::CLONE_FS)?;
        chdir(folder.as_str())?;
        let source = Some(one.source.as_str());
        mount(source, target, Some("overlay"), options.flags, Some(data.as_str()))
    })
}

/// The common folder of all layers, and the options with paths relative to it.
fn shorten(options: &[String]) -> Option<(String, String)> {
    let layers = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&str> = layers.split(':').collect();
    let first = layers.first()?;
    let common = layers.iter().fold(first.len(), |common, layer| {
        let same = first.bytes().zip(layer.bytes()).take_while(|(a, b)| a == b).count();
        common.min(same)
    });
    // Up to and with the last slash: "/snapshots/1" and "/snapshots/10" share only "/snapshots/".
    let folder = &first[..=first.get(..common)?.rfind('/')?];
    let short: Vec<&str> = layers.iter().map(|layer| &layer[folder.len()..]).collect();
    if short.contains(&"") {
        return None;
    }
    let data: Vec<String> = options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", short.join(":")),
            None => option.clone(),
        })
        .collect();
    Some((folder.to_owned(), data.join(",")))
}

fn page_size() -> usize {
    sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_layers_are_shortened() {
        let options =
            ["upperdir=/s/12/fs".to_owned(), "lowerdir=/s/1/fs:/s/10/fs:/s/100/fs".to_owned()];
        let (folder, data) = shorten(&options).unwrap();
        assert_eq!(folder, "/s/");
        assert_eq!(data, "upperdir=/s/12/fs,lowerdir=1/fs:10/fs:100/fs");
        assert_eq!(shorten(&["lowerdir=/a/b:/a/".to_owned()]), None);
        assert_eq!(shorten(&["upperdir=/a".to_owned()]), None);
    }

    #[test]
    fn a_target_outside_is_refused() {
        let mounts = [RootfsMount { target: "/../../etc".to_owned(), ..RootfsMount::default() }];
        let error = Rootfs::mount(&mounts, Path::new("/nowhere")).unwrap_err();
        assert!(matches!(error, ResourceError::OutsideTarget(_)));
    }

    #[test]
    fn a_failing_mount_is_described() {
        let mounts = [RootfsMount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec!["lowerdir=/nowhere/a".to_owned()],
            ..RootfsMount::default()
        }];
        let error = Rootfs::mount(&mounts, Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "cannot mount overlay overlay on /nowhere");
    }
}
