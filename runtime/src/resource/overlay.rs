//! Overlays, also of more layers than a mount option has room for.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount as mount_on};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{SysconfVar, chdir, sysconf};
use rustix::fs::Mode;

use super::MountOptions;
use super::detached::{Detached, errno, find};

/// `fsconfig(2)` takes a text of less than so many bytes.
const LONGEST_TEXT: usize = 256;

/// Makes an overlay in the calling thread's mount namespace. The thread must share its working folder
/// with no other: it changes here if there are many layers.
pub(super) fn mount(source: &str, options: &MountOptions) -> Result<Detached, Errno> {
    if options.data.iter().all(|option| option.len() < LONGEST_TEXT) {
        return Detached::new("overlay", source, options);
    }
    // The paths are shortened: they are looked up from their common folder.
    let (folder, data) = shorten(&options.data).ok_or(Errno::E2BIG)?;
    chdir(folder.as_str())?;
    let options = MountOptions { data, ..options.clone() };
    if options.data.iter().all(|option| option.len() < LONGEST_TEXT) {
        return Detached::new("overlay", source, &options);
    }
    by_mount(source, &options)
}

/// Makes an overlay by `mount(2)`, which takes a page of options, in a copy of the mount namespace that
/// ends with the calling thread. The working folder stays.
fn by_mount(source: &str, options: &MountOptions) -> Result<Detached, Errno> {
    let data = options.data();
    // The kernel cuts what is longer without a word.
    if data.len() >= page_size() {
        return Err(Errno::E2BIG);
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount_on(none, "/", none, private, none)?;
    let place = Detached::new("tmpfs", "husk", &MountOptions::default())?;
    let place = place.attach(find("/".as_ref())?)?;
    rustix::fs::mkdirat(&place, c"overlay", Mode::RWXU).map_err(errno)?;
    // Nobody else is in this namespace.
    let target = format!("/proc/thread-self/fd/{}/overlay", place.as_raw_fd());
    let flags = options.flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_on(Some(source), target.as_str(), Some("overlay"), flags, Some(data.as_str()))?;
    let flags = MountOptions { flags: options.flags, ..MountOptions::default() };
    Detached::clone_at(target.as_ref(), &flags)
}

/// The common folder of all layers, and the options with paths relative to it.
fn shorten(options: &[String]) -> Option<(String, Vec<String>)> {
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
    let data = options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", short.join(":")),
            None => option.clone(),
        })
        .collect();
    Some((folder.to_owned(), data))
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
    use crate::apart::HostMounts;
    use crate::apart::tests::with_own_mounts;

    /// Few layers by their whole paths, more by shortened ones, and most by a page of options.
    #[test]
    fn overlays_of_few_and_many_layers() {
        with_own_mounts(|| {
            let place = husk_stage::Stage::new().unwrap();
            let path = |name: String| place.path().join(name).to_string_lossy().into_owned();
            // Overlays do not lie on every file system.
            let mounted = Detached::new("tmpfs", "test", &MountOptions::default()).unwrap();
            mounted.attach(find(place.path()).unwrap()).unwrap();
            for layers in [2, 12, 60, 120] {
                let layer = |number: usize| path(format!("snapshots/{number:03}/fs"));
                for number in 0..=layers {
                    std::fs::create_dir_all(layer(number)).unwrap();
                    std::fs::write(format!("{}/{number}", layer(number)), "").unwrap();
                }
                let (upper, work) = (path(format!("{layers}/u")), path(format!("{layers}/w")));
                std::fs::create_dir_all(&upper).unwrap();
                std::fs::create_dir_all(&work).unwrap();
                let lower = (0..layers).map(layer).collect::<Vec<_>>().join(":");
                let options = [
                    format!("workdir={work}"),
                    format!("upperdir={upper}"),
                    format!("lowerdir={lower}"),
                ];
                let options = MountOptions::parse(&options).unwrap();
                let overlay = HostMounts::default().within(|| mount("overlay", &options)).unwrap();
                let target = path(format!("{layers}/u"));
                overlay.attach(find(target.as_ref()).unwrap()).unwrap();
                assert_eq!(std::fs::read_dir(&target).unwrap().count(), layers, "{layers}");
                std::fs::write(format!("{target}/written"), "").unwrap();
                let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                let line = table.lines().find(|line| line.contains(&target)).unwrap();
                assert!(line.contains(" rw,nosuid,nodev,noexec,"), "{line}");
                super::super::memory::unmount(target.as_ref());
            }
            super::super::memory::unmount(place.path());
        });
    }

    #[test]
    fn many_layers_are_shortened() {
        let options =
            ["upperdir=/s/12/fs".to_owned(), "lowerdir=/s/1/fs:/s/10/fs:/s/100/fs".to_owned()];
        let (folder, data) = shorten(&options).unwrap();
        assert_eq!(folder, "/s/");
        assert_eq!(data, ["upperdir=/s/12/fs", "lowerdir=1/fs:10/fs:100/fs"]);
        assert_eq!(shorten(&["lowerdir=/a/b:/a/".to_owned()]), None);
        assert_eq!(shorten(&["upperdir=/a".to_owned()]), None);
    }
}
