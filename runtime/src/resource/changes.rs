//! Changes that the host makes on volumes, for the guest's programs that watch them by inotify.
//!
//! Watched are single files, and the folders in which the kubelet replaces what it projects. A watch is
//! made on the descriptor by which the source was opened, and belongs to that file, whatever becomes of
//! its path. It ends with the volume.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex};

use nix::sys::prctl::{get_dumpable, set_dumpable};
use rustix::fs::inotify::{
    CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch,
};

use super::VolumeKind;
use super::detached::errno;
use crate::apart::apart;
use crate::lock::lock;

/// Folders below which the kubelet projects what it keeps up to date.
const PROJECTED: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~downward-api",
    "kubernetes.io~projected",
    "kubernetes.io~secret",
];

/// Changes that are told at once. Of more the guest hears nothing.
const MOST: usize = 64;

/// Bytes of events that are read at once.
const BUFFER: usize = 16 << 10;

/// A change of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The volume's name.
    pub volume: String,
    /// The kind of change.
    pub kind: ChangeKind,
    /// The name in the volume; empty if the volume itself has changed.
    pub name: Vec<u8>,
    /// Whether the name is a folder's.
    pub is_folder: bool,
}

/// The kinds of changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    /// A name has come.
    Created,
    /// A name has gone.
    Removed,
    /// A name was another before.
    Renamed(Vec<u8>),
    /// The content was written to.
    Content,
    /// Mode, owner, times or the number of links.
    Attributes,
}

/// The watches of a sandbox.
#[derive(Debug, Default)]
pub struct Changes(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    events: Option<OwnedFd>,
    followed: bool,
    /// Names of volumes by the number of the watch: several may be of one file.
    volumes: HashMap<i32, Vec<String>>,
}

/// The watch of one volume; dropping ends it.
#[derive(Debug)]
pub(super) struct Watched {
    changes: Arc<Changes>,
    number: i32,
    volume: String,
}

/// Whether the guest is told of changes of the volume at `source`.
pub(super) fn is_watched(source: &Path, kind: VolumeKind) -> bool {
    let projected =
        |part: Component<'_>| PROJECTED.iter().any(|name| part.as_os_str() == OsStr::new(name));
    kind == VolumeKind::File || source.components().any(projected)
}

impl Changes {
    /// Watches the file or folder `source` as the volume of that name.
    pub(super) fn watch(
        self: &Arc<Self>,
        source: BorrowedFd<'_>,
        kind: VolumeKind,
        volume: &str,
    ) -> io::Result<Watched> {
        let mut wanted = WatchFlags::ATTRIB | WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
        if kind == VolumeKind::Folder {
            wanted |= WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        }
        let mut state = lock(&self.0);
        if state.events.is_none() {
            state.events = Some(instance()?);
        }
        let Some(events) = &state.events else { return Err(io::ErrorKind::NotFound.into()) };
        let path = format!("/proc/thread-self/fd/{}", source.as_raw_fd());
        let number = add_watch(events, path, wanted).map_err(errno)?;
        state.volumes.entry(number).or_default().push(volume.to_owned());
        Ok(Watched { changes: Arc::clone(self), number, volume: volume.to_owned() })
    }

    /// Returns the descriptor that is readable when something has changed, to the first who asks.
    pub fn follow(&self) -> Option<OwnedFd> {
        let mut state = lock(&self.0);
        let events = state.events.as_ref().filter(|_| !state.followed)?.try_clone().ok()?;
        state.followed = true;
        Some(events)
    }

    /// Reads what has changed, repetitions left out.
    pub fn read(&self) -> io::Result<Vec<Change>> {
        let state = lock(&self.0);
        let Some(events) = &state.events else { return Ok(Vec::new()) };
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(events.as_fd(), &mut buffer);
        let mut batch = Batch::default();
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes()).unwrap_or_default();
                    let volumes = state.volumes.get(&event.wd()).map_or(&[][..], Vec::as_slice);
                    batch.add(volumes, event.events(), event.cookie(), name);
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(batch.changes),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut state = lock(&self.changes.0);
        let Some(volumes) = state.volumes.get_mut(&self.number) else { return };
        volumes.retain(|volume| *volume != self.volume);
        if volumes.is_empty() {
            state.volumes.remove(&self.number);
            if let Some(events) = &state.events {
                // The kernel ends it when the file is gone.
                let _ = remove_watch(events, self.number);
            }
        }
    }
}

/// The first of the user ids that inotify instances are made as, which no user has.
const FIRST_USER: u32 = 0x7000_0000;

/// Makes an inotify instance. A user may have 128 of them, and root's are for the kubelet and its like: so
/// this is one of a user id that only this process uses.
fn instance() -> io::Result<OwnedFd> {
    apart(|| {
        let dumpable = get_dumpable().unwrap_or(false);
        // SAFETY: plain numbers. This call is the thread's alone, unlike the C library's, and the thread ends
        // here. Without the right to it the instance is the calling user's.
        unsafe { libc::syscall(libc::SYS_setresuid, -1, FIRST_USER + std::process::id(), -1) };
        let made = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        // The kernel has taken that away from the whole process.
        let _ = set_dumpable(dumpable);
        made.map_err(errno)
    })
    .map_err(io::Error::from)
}

/// Changes that are told together.
#[derive(Debug, Default)]
struct Batch {
    changes: Vec<Change>,
    /// The cookie and place of names that were moved from, and may have been moved to another.
    moved: HashMap<(u32, String), usize>,
}

impl Batch {
    fn add(&mut self, volumes: &[String], events: ReadFlags, cookie: u32, name: &[u8]) {
        let is_folder = events.contains(ReadFlags::ISDIR);
        for volume in volumes {
            let key = (cookie, volume.clone());
            let change =
                |kind| Change { volume: volume.clone(), kind, name: name.to_vec(), is_folder };
            if events.contains(ReadFlags::MOVED_TO)
                && let Some(from) = self.moved.remove(&key)
            {
                let old = std::mem::take(&mut self.changes[from].name);
                self.changes[from] = change(ChangeKind::Renamed(old));
                continue;
            }
            let kind = if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                ChangeKind::Created
            } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
                ChangeKind::Removed
            } else if events.intersects(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) {
                ChangeKind::Content
            } else if events.contains(ReadFlags::ATTRIB) {
                ChangeKind::Attributes
            } else {
                continue;
            };
            let change = change(kind);
            // Written to often is written to.
            let again = matches!(change.kind, ChangeKind::Content | ChangeKind::Attributes)
                && self.changes.contains(&change);
            if again || self.changes.len() >= MOST {
                continue;
            }
            if events.contains(ReadFlags::MOVED_FROM) {
                self.moved.insert(key, self.changes.len());
            }
            self.changes.push(change);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn changed(kind: ChangeKind, name: &str, is_folder: bool) -> Change {
        Change { volume: "7".to_owned(), kind, name: name.into(), is_folder }
    }

    #[test]
    fn a_projected_volume_is_told_as_the_kubelet_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("..old")).unwrap();
        std::os::unix::fs::symlink("..old", at("..data")).unwrap();
        let changes = Arc::new(Changes::default());
        assert!(changes.follow().is_none());
        let source = File::open(folder.path()).unwrap();
        let watched = changes.watch(source.as_fd(), VolumeKind::Folder, "7").unwrap();
        assert!(changes.follow().is_some() && changes.follow().is_none());
        fs::create_dir(at("..new")).unwrap();
        std::os::unix::fs::symlink("..new", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir(at("..old")).unwrap();
        let wanted = [
            changed(ChangeKind::Created, "..new", true),
            changed(ChangeKind::Created, "..data_tmp", false),
            changed(ChangeKind::Renamed(b"..data_tmp".to_vec()), "..data", false),
            changed(ChangeKind::Removed, "..old", true),
        ];
        assert_eq!(changes.read().unwrap(), wanted);
        drop(watched);
        fs::create_dir(at("later")).unwrap();
        assert!(changes.read().unwrap().is_empty());
    }

    #[test]
    fn a_file_that_is_written_to_often_has_changed_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let changes = Arc::new(Changes::default());
        let source = File::open(file.path()).unwrap();
        let first = changes.watch(source.as_fd(), VolumeKind::File, "7").unwrap();
        let _second = changes.watch(source.as_fd(), VolumeKind::File, "8").unwrap();
        drop(first);
        for number in 0..100 {
            fs::write(file.path(), number.to_string()).unwrap();
        }
        let told = changes.read().unwrap();
        assert_eq!(
            told,
            [Change { volume: "8".to_owned(), ..changed(ChangeKind::Content, "", false) }]
        );
    }

    #[test]
    fn many_changes_are_told_in_part() {
        let mut batch = Batch::default();
        for number in 0..1000 {
            let name = number.to_string();
            batch.add(&["7".to_owned()], ReadFlags::CREATE, 0, name.as_bytes());
        }
        assert_eq!(batch.changes.len(), MOST);
        let other = |name: &str| is_watched(Path::new(name), VolumeKind::Folder);
        assert!(other("/var/lib/kubelet/pods/x/volumes/kubernetes.io~secret/y"));
        assert!(!other("/var/lib/kubelet/pods/x/volumes/kubernetes.io~empty-dir/y"));
        assert!(is_watched(Path::new("/etc/hosts"), VolumeKind::File));
    }
}
