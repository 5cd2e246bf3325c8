//! Random operations, by the server as a guest's kernel would ask for them and by system calls.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::client::{Client, long, longs, terminated, word, words};
use crate::place::{GROUP, Place, VOLUMES};

/// All names that there can be; `s` and `t` are directories.
const NAMES: [&str; 13] =
    ["a", "b", "c", "d", "e", "f", "g", "s/a", "s/b", "s/c", "s/d", "t/a", "t/b"];

/// What is compared of a file.
type Seen = (u32, u32, u32, u32, u64);

struct Open {
    node: u64,
    /// `None` if the guest keeps the file without its content, as by `O_PATH` or a mark of inotify.
    handle: Option<u64>,
    plain: File,
}

pub struct World {
    client: Client,
    place: Place,
    views: Option<Views>,
    random: u64,
    /// What the guest knows: names and their nodes.
    entries: BTreeMap<&'static str, u64>,
    folders: HashMap<&'static str, u64>,
    lookups: HashMap<u64, u64>,
    open: Vec<Open>,
    log: Vec<String>,
    watcher: Watcher,
}

/// Volumes beside the one that is worked in.
struct Views {
    group: u64,
    /// The folder `s` or `t`: its volume and node.
    part: (String, u64),
    /// All, read-only.
    read_only: (String, u64),
}

fn path_text(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn outcome<T>(result: io::Result<T>) -> Result<(), i32> {
    result.map(drop).map_err(|error| error.raw_os_error().unwrap_or(0))
}

fn called(result: libc::c_int) -> Result<(), i32> {
    outcome(if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
}

/// struct fuse_attr.
fn seen(attributes: &[u8]) -> Seen {
    let word = |at| word(attributes, at);
    (word(60), word(64), word(68), word(72), long(attributes, 8))
}

fn told(metadata: &fs::Metadata) -> Seen {
    let links = u32::try_from(metadata.nlink()).unwrap();
    (metadata.mode(), links, metadata.uid(), metadata.gid(), metadata.size())
}

impl World {
    pub fn new(client: Client, place: Place, seed: u64) -> Self {
        let mut world = Self {
            client,
            place,
            views: None,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            entries: BTreeMap::new(),
            folders: HashMap::from([("", 1)]),
            lookups: HashMap::new(),
            open: Vec::new(),
            log: Vec::new(),
            watcher: Watcher::new(),
        };
        if world.place.has_volumes() {
            let (volumes, _) = world.look_up(1, VOLUMES).unwrap();
            let (group, _) = world.look_up(volumes, GROUP).unwrap();
            // Whatever is found here first is found by the read-only one first.
            let [read_only, whole, part] = [("", true), ("", false), ("s", false)]
                .map(|(folder, read_only)| world.add_volume(group, folder, read_only));
            world.folders.insert("", whole.1);
            world.views = Some(Views { group, part, read_only });
        }
        world
    }

    fn add_volume(&mut self, group: u64, folder: &str, read_only: bool) -> (String, u64) {
        let name = self.place.add_volume(folder, read_only);
        let (node, _) = self.look_up(group, &name).unwrap();
        (name, node)
    }

    /// Takes a volume away and adds another like it.
    fn mount_again(&mut self) {
        let Some(mut views) = self.views.take() else { return };
        let part = if self.place.served().join("s").exists() { "s" } else { "t" };
        if self.draw(2) == 0 {
            self.place.remove_volume(&views.part.0);
            views.part = self.add_volume(views.group, part, false);
        } else {
            self.place.remove_volume(&views.read_only.0);
            views.read_only = self.add_volume(views.group, "", true);
        }
        self.views = Some(views);
    }

    /// As another container would, whose volume is read-only.
    fn glance(&mut self, name: &'static str) {
        let Some(views) = &self.views else { return };
        let (folder, last) = Self::split(name);
        let mut node = views.read_only.1;
        if !folder.is_empty() {
            let Ok((found, _)) = self.look_up(node, folder) else { return };
            node = found;
        }
        if let Ok((node, seen)) = self.look_up(node, last) {
            assert_eq!(seen, told(&fs::symlink_metadata(self.plain(name)).unwrap()));
            let known = *self.entries.entry(name).or_insert(node);
            assert_eq!(known, node, "{name} after {:#?}", self.tail());
        }
    }

    /// The directory of that name by one volume or the other, whichever.
    fn any_folder(&mut self, name: &'static str) -> Option<u64> {
        let found = self.folder(name);
        match &self.views {
            Some(views) if !name.is_empty() && found.is_some() => {
                let part = views.part.1;
                if self.draw(2) == 0 { Some(part) } else { found }
            }
            _ => found,
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % below as u64).unwrap()
    }

    fn plain(&self, name: &str) -> PathBuf {
        self.place.plain().join(name)
    }

    fn look_up(&mut self, folder: u64, name: &str) -> Result<(u64, Seen), i32> {
        let bytes = self.client.call(1, folder, &terminated(name))?;
        let node = long(&bytes, 0);
        if node == 0 {
            return Err(libc::ENOENT);
        }
        *self.lookups.entry(node).or_default() += 1;
        Ok((node, seen(&bytes[40..])))
    }

    fn split(name: &'static str) -> (&'static str, &'static str) {
        name.split_once('/').unwrap_or(("", name))
    }

    fn folder(&mut self, name: &'static str) -> Option<u64> {
        if let Some(node) = self.folders.get(name) {
            return Some(*node);
        }
        let (node, _) = self.look_up(self.folders[""], name).ok()?;
        self.folders.insert(name, node);
        Some(node)
    }

    /// As the guest's kernel would: from its cache, or by looking up.
    fn node(&mut self, name: &'static str) -> Option<u64> {
        if let Some(node) = self.entries.get(name) {
            return Some(*node);
        }
        let (folder, last) = Self::split(name);
        let folder = self.any_folder(folder)?;
        let (node, _) = self.look_up(folder, last).ok()?;
        self.entries.insert(name, node);
        Some(node)
    }

    /// As the guest's kernel would, when nothing needs the inode any more.
    fn forget(&mut self, node: u64) {
        let used = self.entries.values().any(|other| *other == node)
            || self.folders.values().any(|other| *other == node)
            || self.open.iter().any(|open| open.node == node);
        if used {
            return;
        }
        if let Some(count) = self.lookups.remove(&node) {
            self.client.send(2, node, &longs(&[count]));
        }
    }

    pub fn run(mut self, steps: usize) {
        self.check();
        for step in 0..steps {
            let (one, other) = (NAMES[self.draw(NAMES.len())], NAMES[self.draw(NAMES.len())]);
            let choice = self.draw(if self.views.is_some() { 19 } else { 16 });
            self.log.push(format!("{step}: {choice} {one} {other}"));
            self.step(choice, one, other);
            if self.draw(3) == 0 || choice > 7 {
                self.check();
            }
            let beside = self.draw(8);
            if beside < 2 {
                self.log.push(format!("{step}: beside {beside} {one}"));
                if beside == 0 {
                    self.hold(one)
                } else {
                    self.replace_by_host(one)
                }
                self.check();
            }
        }
    }

    fn compare(&self, server: Result<(), i32>, plain: Result<(), i32>) -> bool {
        assert_eq!(server, plain, "server, plain; after {:#?}", self.tail());
        plain.is_ok()
    }

    fn tail(&self) -> &[String] {
        &self.log[self.log.len().saturating_sub(12)..]
    }

    fn step(&mut self, choice: usize, one: &'static str, other: &'static str) {
        match choice {
            0..=4 => self.change(choice, one),
            5 => self.open(one),
            6 => self.close(),
            7 => self.evict(one),
            8 | 9 => self.link(one, other),
            10 => self.unlink(one),
            11 | 12 => self.rename(one, other, 0),
            13 => self.rename(one, other, libc::RENAME_EXCHANGE),
            14 => self.create(one),
            16 | 17 => self.glance(one),
            18 => self.mount_again(),
            _ => self.move_folder(),
        }
    }

    fn change(&mut self, choice: usize, name: &'static str) {
        let (folder, last) = Self::split(name);
        if let Some(folder) = self.any_folder(folder) {
            self.look_first(folder, last);
        }
        let Some(node) = self.node(name) else { return };
        let path = self.plain(name);
        let value = u32::try_from(self.draw(0o777)).unwrap();
        // struct fuse_setattr_in: valid, ..., size at 16, mode at 68, uid at 76.
        let mut body = vec![0; 88];
        match choice {
            0 => {
                let text = format!("by {name} {value}");
                let server = self.client.open(node, libc::O_WRONLY);
                let server = server.map(|handle| {
                    self.client.write((node, handle), 3, text.as_bytes(), 0, 0).unwrap();
                    let body = [longs(&[handle]), words(&[0; 4])].concat();
                    self.client.call(18, node, &body).unwrap();
                });
                let plain = File::options().write(true).open(&path);
                let plain = plain.and_then(|file| file.write_all_at(text.as_bytes(), 3));
                self.compare(server, outcome(plain));
            }
            1 => {
                body[..4].copy_from_slice(&1_u32.to_ne_bytes());
                body[68..72].copy_from_slice(&(0o100_000 | value).to_ne_bytes());
                let server = self.client.call(4, node, &body).map(drop);
                let mode = fs::Permissions::from_mode(value);
                self.compare(server, outcome(fs::set_permissions(&path, mode)));
            }
            2 => {
                body[..4].copy_from_slice(&2_u32.to_ne_bytes());
                body[76..80].copy_from_slice(&value.to_ne_bytes());
                let server = self.client.call(4, node, &body).map(drop);
                let plain = std::os::unix::fs::lchown(&path, Some(value), None);
                self.compare(server, outcome(plain));
            }
            3 => {
                body[..4].copy_from_slice(&8_u32.to_ne_bytes());
                body[16..24].copy_from_slice(&u64::from(value).to_ne_bytes());
                let server = self.client.call(4, node, &body).map(drop);
                let plain = File::options().write(true).open(&path);
                let plain = plain.and_then(|file| file.set_len(u64::from(value)));
                self.compare(server, outcome(plain));
            }
            _ => {
                let text = value.to_string();
                let size = u32::try_from(text.len()).unwrap();
                let name = "security.husk";
                let body = [words(&[size, 0]), terminated(name), text.clone().into_bytes()];
                let server = self.client.call(21, node, &body.concat()).map(drop);
                let (path, name) = (path_text(&path), CString::new(name).unwrap());
                // SAFETY: both texts are terminated, and the value goes with its length.
                let plain = called(unsafe {
                    libc::lsetxattr(
                        path.as_ptr(),
                        name.as_ptr(),
                        text.as_ptr().cast(),
                        text.len(),
                        0,
                    )
                });
                self.compare(server, plain);
            }
        }
    }

    fn open(&mut self, name: &'static str) {
        if self.open.len() >= 5 {
            return;
        }
        let Some(node) = self.node(name) else { return };
        let server = self.client.open(node, libc::O_RDONLY);
        let plain = File::open(self.plain(name));
        self.compare(
            server.map(drop),
            outcome(
                plain.as_ref().map(drop).map_err(|error| {
                    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(0))
                }),
            ),
        );
        if let (Ok(handle), Ok(plain)) = (server, plain) {
            self.open.push(Open { node, handle: Some(handle), plain });
        }
    }

    fn close(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let index = self.draw(self.open.len());
        let open = self.open.swap_remove(index);
        if let Some(handle) = open.handle {
            let body = [longs(&[handle]), words(&[0; 4])].concat();
            self.client.call(18, open.node, &body).unwrap();
        }
        self.forget(open.node);
    }

    /// The guest keeps a file without its content.
    fn hold(&mut self, name: &'static str) {
        let plain = File::options().read(true).custom_flags(libc::O_PATH).open(self.plain(name));
        if let (true, Some(node), Ok(plain)) = (self.open.len() < 5, self.node(name), plain) {
            self.open.push(Open { node, handle: None, plain });
        }
    }

    /// The host makes a file anew, which may get the number of the old one.
    fn replace_by_host(&mut self, name: &'static str) {
        let Ok(plain) = fs::symlink_metadata(self.plain(name)) else { return };
        let before = self.node(name).unwrap();
        let is_open = |open: &Open| open.node == before;
        // The server keeps no descriptor of what the host removes.
        if self.open.iter().any(|open| is_open(open) && open.handle.is_none()) {
            return;
        }
        let lost = plain.nlink() == 1 && !self.open.iter().any(is_open);
        for copy in [self.place.served(), self.place.plain()] {
            fs::remove_file(copy.join(name)).unwrap();
            fs::write(copy.join(name), "made anew").unwrap();
        }
        // Before its name leads to the new file.
        match self.client.call(3, before, &[0; 16]) {
            // A descriptor was at hand.
            Ok(bytes) if lost => assert_eq!(seen(&bytes[16..]).1, 0, "{:#?}", self.tail()),
            Ok(_) => {}
            Err(error) => assert_eq!(error, libc::ESTALE, "{:#?}", self.tail()),
        }
        self.entries.remove(name);
        let now = self.node(name).unwrap();
        assert_ne!(now, before, "the node of {name} after {:#?}", self.tail());
        self.forget(before);
    }

    fn evict(&mut self, name: &'static str) {
        if let Some(node) = self.entries.remove(name) {
            self.forget(node);
        }
    }

    fn link(&mut self, one: &'static str, other: &'static str) {
        let (folder, last) = Self::split(other);
        let Some(node) = self.node(one) else { return };
        let Some(folder) = self.linking_folder(one, folder) else { return };
        let body = [longs(&[node]), terminated(last)].concat();
        let server = self.client.call(13, folder, &body);
        let plain = fs::hard_link(self.plain(one), self.plain(other));
        if self.compare(server.as_ref().map(drop).map_err(|error| *error), outcome(plain)) {
            let linked = long(&server.unwrap(), 0);
            assert_eq!(linked, node, "after {:#?}", self.tail());
            *self.lookups.entry(linked).or_default() += 1;
            self.entries.insert(other, linked);
        }
    }

    /// The directory `folder` to link `one` in, of whatever volume; as the guest's kernel would, `one` is
    /// looked up in the same.
    fn linking_folder(&mut self, one: &'static str, folder: &'static str) -> Option<u64> {
        let (from, name) = Self::split(one);
        let target = if from == folder { self.any_folder(folder) } else { self.folder(folder) }?;
        let from = if from == folder { Some(target) } else { self.folder(from) }?;
        self.look_first(from, name);
        Some(target)
    }

    /// The guest's kernel looks up a name in the volume where it changes it.
    fn look_first(&mut self, folder: u64, name: &str) {
        if self.views.is_some() {
            let _ = self.look_up(folder, name);
        }
    }

    fn unlink(&mut self, name: &'static str) {
        let (folder, last) = Self::split(name);
        let Some(folder) = self.any_folder(folder) else { return };
        self.look_first(folder, last);
        let server = self.client.call(10, folder, &terminated(last)).map(drop);
        if self.compare(server, outcome(fs::remove_file(self.plain(name)))) {
            self.evict(name);
        }
    }

    fn rename(&mut self, one: &'static str, other: &'static str, flags: u32) {
        let (from, old) = Self::split(one);
        let (to, new) = Self::split(other);
        let same = from == to;
        let Some(from) = (if same { self.any_folder(from) } else { self.folder(from) }) else {
            return;
        };
        let Some(to) = (if same { Some(from) } else { self.folder(to) }) else { return };
        for (folder, name) in [(from, old), (to, new)] {
            self.look_first(folder, name);
        }
        let (mover, over) = (self.node(one), self.node(other));
        // To the guest's kernel these are one file, and nothing is to be done.
        if mover.is_some() && mover == over {
            return;
        }
        let body = [longs(&[to]), words(&[flags, 0]), terminated(old), terminated(new)].concat();
        let server = self.client.call(45, from, &body).map(drop);
        let [one_path, other_path] = [one, other].map(|name| path_text(&self.plain(name)));
        // SAFETY: both paths are terminated.
        let plain = called(unsafe {
            libc::renameat2(-1, one_path.as_ptr(), -1, other_path.as_ptr(), flags)
        });
        if !self.compare(server, plain) {
            return;
        }
        let (mover, over) = (self.entries.remove(one), self.entries.remove(other));
        if let Some(mover) = mover {
            self.entries.insert(other, mover);
        }
        match over {
            Some(over) if flags == libc::RENAME_EXCHANGE => drop(self.entries.insert(one, over)),
            Some(over) => self.forget(over),
            None => {}
        }
    }

    fn create(&mut self, name: &'static str) {
        let (folder, last) = Self::split(name);
        let Some(folder) = self.any_folder(folder) else { return };
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        let server = self.client.create(folder, last, flags, libc::S_IFREG | 0o640, 0);
        let plain = File::options().write(true).create_new(true).open(self.plain(name));
        let plain = plain.and_then(|file| file.set_permissions(fs::Permissions::from_mode(0o640)));
        if self.compare(server.map(drop), outcome(plain)) {
            let (entry, handle) = server.unwrap();
            *self.lookups.entry(entry.node).or_default() += 1;
            self.entries.insert(name, entry.node);
            let body = [longs(&[handle]), words(&[0; 4])].concat();
            self.client.call(18, entry.node, &body).unwrap();
        }
    }

    /// `s` becomes `t` or the other way round; a lower layer's stays where it is.
    fn move_folder(&mut self) {
        let (old, new) = if self.folder("s").is_some() { ("s", "t") } else { ("t", "s") };
        let root = self.folders[""];
        let body = [longs(&[root]), words(&[0, 0]), terminated(old), terminated(new)].concat();
        let server = self.client.call(45, root, &body).map(drop);
        if !self.compare(server, outcome(fs::rename(self.plain(old), self.plain(new)))) {
            return;
        }
        if let Some(node) = self.folders.remove(old) {
            self.folders.insert(new, node);
        }
        let inside: Vec<_> =
            self.entries.keys().copied().filter(|name| Self::split(name).0 == old).collect();
        for name in inside {
            let moved = NAMES.iter().find(|other| Self::split(other) == (new, Self::split(name).1));
            let node = self.entries.remove(name).unwrap();
            match moved {
                Some(moved) => drop(self.entries.insert(moved, node)),
                None => self.forget(node),
            }
        }
    }

    /// All names, and all that is open.
    fn check(&mut self) {
        let mut watches = BTreeMap::new();
        for name in NAMES {
            let plain = fs::symlink_metadata(self.plain(name)).ok();
            let (folder, last) = Self::split(name);
            let found = self.any_folder(folder).and_then(|folder| self.look_up(folder, last).ok());
            assert_eq!(
                found.map(|(_, seen)| seen),
                plain.as_ref().map(told),
                "{name} after {:#?}",
                self.tail()
            );
            let Some((node, _)) = found else { continue };
            if let Some(before) = self.entries.insert(name, node) {
                assert_eq!(before, node, "the node of {name} after {:#?}", self.tail());
            }
            watches.insert(name, self.watcher.watch(&self.plain(name)));
            let [served, plain] =
                [self.place.served(), self.place.plain()].map(|copy| fs::read(copy.join(name)));
            assert_eq!(served.unwrap(), plain.unwrap(), "{name} after {:#?}", self.tail());
        }
        for (name, watch) in &watches {
            for (other, another) in &watches {
                let one = self.entries[name] == self.entries[other];
                assert_eq!(one, watch == another, "{name}, {other} after {:#?}", self.tail());
            }
        }
        for index in 0..self.open.len() {
            let (node, handle) = (self.open[index].node, self.open[index].handle);
            let bytes = self.client.call(3, node, &[0; 16]);
            let bytes = bytes.unwrap_or_else(|error| panic!("{error} after {:#?}", self.tail()));
            let plain = &self.open[index].plain;
            assert_eq!(seen(&bytes[16..]), told(&plain.metadata().unwrap()), "{:#?}", self.tail());
            let Some(handle) = handle else { continue };
            let mut wanted = vec![0; 2000];
            let count = plain.read_at(&mut wanted, 0).unwrap();
            wanted.truncate(count);
            assert_eq!(self.client.read((node, handle), 0, 2000).unwrap(), wanted);
        }
    }
}

/// Tells whether names are of one inode: watching it twice gives one number.
struct Watcher(OwnedFd);

impl Watcher {
    fn new() -> Self {
        // SAFETY: plain flags; the descriptor is nobody else's.
        unsafe {
            let descriptor = libc::inotify_init1(libc::IN_CLOEXEC);
            assert!(descriptor >= 0);
            Self(OwnedFd::from_raw_fd(descriptor))
        }
    }

    fn watch(&self, path: &Path) -> i32 {
        let path = path_text(path);
        // SAFETY: the path is terminated.
        unsafe { libc::inotify_add_watch(self.0.as_raw_fd(), path.as_ptr(), libc::IN_ATTRIB) }
    }
}
