//! The files that the guest remembers, and the way to each.
//!
//! A node is a name in another node. No descriptor is held for it beyond those that were used lately:
//! it is opened again name by name, and what is found is compared with what was there before
//! ([`Identity`]). If that is another file, the node is gone (`ESTALE`), and the guest's kernel looks
//! its path up anew. So the guest may remember as many files as it likes, and no node ever leads to
//! another file than it did.
//!
//! Names are one node only if the host's kernel has one inode for them. A file that was unlinked goes
//! on through the descriptors that are open; if there are none, through one that is kept for it.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::SystemTime;

use super::credentials::permitted;
use super::hold::Held;
use super::identity::{Domain, Identity};
use super::system::{Status, open_path};
use super::table::{Found, Known, Place, Table};
use super::watcher::Watcher;

/// How often a lookup begins anew because others changed what it found.
const TRIES: usize = 4;

/// How much the guest may make the server hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Nodes. Each costs 500 to 850 bytes with its name: hash tables double.
    pub nodes: usize,
    /// Descriptors of nodes that were used lately.
    pub held: usize,
    /// Descriptors of nodes that were unlinked and are not open.
    pub pinned: usize,
    /// Open files and directories.
    pub handles: usize,
}

/// A file with a descriptor of it.
#[derive(Debug, Clone)]
pub struct Node {
    /// The number that the guest knows.
    pub number: u64,
    /// A descriptor, `O_PATH` or one that was opened for the content.
    pub file: Arc<File>,
    /// The file system that it belongs to in the guest.
    pub domain: Arc<Domain>,
    /// The mount that it was found on.
    pub mount: u64,
    /// `S_IFMT` bits; they never change.
    kind: u32,
}

impl Node {
    fn of(number: u64, known: &Known, file: Arc<File>) -> Self {
        Self {
            number,
            file,
            domain: Arc::clone(&known.domain),
            mount: known.mount,
            kind: known.identity.kind(),
        }
    }

    /// A folder or a regular file: what may be opened for its content.
    pub fn may_be_opened(&self) -> bool {
        matches!(self.kind, libc::S_IFREG | libc::S_IFDIR)
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }
}

/// All nodes, by their number (the guest's `nodeid`).
#[derive(Debug)]
pub struct Nodes {
    table: RwLock<Table>,
    held: Mutex<Held>,
    /// Written to from before a rename until the table follows it: names lead nowhere meanwhile.
    renames: RwLock<()>,
    next_domain: AtomicU64,
    root_mount: u64,
    limits: Limits,
    /// Compares inodes.
    pub watcher: Watcher,
}

/// Whether a name is one of a node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Same,
    Other,
    /// It cannot be compared: the node is not where it was, or the host refuses.
    Unknown,
}

/// What a name was before it is removed or renamed.
#[derive(Debug)]
pub struct Before {
    place: Place,
    node: Option<Node>,
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

impl Nodes {
    /// Only the root, which is never forgotten.
    pub fn new(root: File, status: &Status, limits: Limits) -> Self {
        Self {
            table: RwLock::new(Table::new(
                (Identity::of(status), status.mount),
                Arc::new(Domain::new(0, status.device)),
                Arc::new(root),
            )),
            held: Mutex::new(Held::new(limits.held)),
            renames: RwLock::default(),
            next_domain: AtomicU64::new(1),
            root_mount: status.mount,
            limits,
            watcher: Watcher::default(),
        }
    }

    // No holder of these locks can panic half way, so poison means nothing.
    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mount that the shared folder itself is on.
    pub fn root_mount(&self) -> u64 {
        self.root_mount
    }

    /// Returns the node of that number, if the guest may know it and the file is still there.
    pub fn get(&self, number: u64) -> io::Result<Node> {
        if let Some(node) = self.at_hand(number)? {
            return Ok(node);
        }
        self.walk(number).or_else(|_| {
            // A rename may have been between the host and the table.
            let _still = self.renames.read().unwrap_or_else(PoisonError::into_inner);
            self.walk(number)
        })
    }

    /// Returns the node if a descriptor of it is open.
    fn at_hand(&self, number: u64) -> io::Result<Option<Node>> {
        let path = {
            let table = self.table();
            let known = table.get(number).ok_or_else(stale)?;
            match known.path() {
                Some(file) => Node::of(number, known, file),
                None => {
                    let file = known.descriptor();
                    return Ok(file.map(|file| Node::of(number, known, file)));
                }
            }
        };
        self.keep(&path);
        Ok(Some(path))
    }

    /// Keeps the node's `O_PATH` descriptor, as it was used.
    fn keep(&self, node: &Node) {
        let gone = self.held().keep(node.number, &node.file);
        // Without the lock.
        drop(gone);
    }

    /// Opens the node by one of the places where it was found.
    fn walk(&self, number: u64) -> io::Result<Node> {
        let places = self.table().get(number).ok_or_else(stale)?.places.clone();
        let mut result = Err(stale());
        for (folder, name) in places {
            result = self.folder(folder).and_then(|folder| self.step(&folder, &name, number));
            if result.is_ok() {
                break;
            }
        }
        // "No such file" would be an answer about the guest's name; the node is what is gone.
        result.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => stale(),
            _ => error,
        })
    }

    /// Opens a directory from the nearest one above it that is at hand.
    fn folder(&self, number: u64) -> io::Result<Node> {
        let mut way = Vec::new();
        let mut at = number;
        let mut node = loop {
            if let Some(node) = self.at_hand(at)? {
                break node;
            }
            let table = self.table();
            let (above, name) =
                table.get(at).and_then(|known| known.places.first()).ok_or_else(stale)?;
            // Longer than all nodes is a circle, of moves on the host that were seen in another order.
            if way.len() > table.len() {
                return Err(stale());
            }
            way.push((at, Arc::clone(name)));
            at = *above;
        };
        for (number, name) in way.into_iter().rev() {
            node = self.step(&node, &name, number)?;
        }
        Ok(node)
    }

    /// Opens one name, which must lead to the node that it led to before.
    fn step(&self, folder: &Node, name: &CStr, number: u64) -> io::Result<Node> {
        let path = Arc::new(self.open_path(&folder.file, name)?);
        let identity = Identity::of(&Status::of(&path)?);
        let same = self.table().get(number).ok_or_else(stale)?.identity == identity;
        if !same && !self.is_still(number, &identity, &path)? {
            return Err(stale());
        }
        self.reached(number, &path)
    }

    /// Whether what looks different is the node all the same: just copied up.
    fn is_still(&self, number: u64, now: &Identity, path: &File) -> io::Result<bool> {
        let (before, descriptor) = {
            let table = self.table();
            let known = table.get(number).ok_or_else(stale)?;
            (known.identity, known.descriptor())
        };
        let same = before.is_at(now, path)
            || before.kind() == now.kind()
                // The same directory mounted again is another.
                && before.mount() == now.mount()
                && descriptor.is_some_and(|file| self.watcher.same_inode(&file, path).unwrap_or(false));
        if same {
            self.change().changed(number, *now);
        }
        Ok(same)
    }

    /// Notes the node's `O_PATH` descriptor, and keeps it as long as it is used.
    fn reached(&self, number: u64, file: &Arc<File>) -> io::Result<Node> {
        let node = {
            let table = self.table();
            let known = table.get(number).ok_or_else(stale)?;
            Node::of(number, known, known.reached(file))
        };
        self.keep(&node);
        Ok(node)
    }

    /// Notes a descriptor that was opened for the content, and is somebody else's.
    pub fn opened(&self, number: u64, file: &Arc<File>) -> io::Result<()> {
        self.table().get(number).ok_or_else(stale)?.opened(file);
        Ok(())
    }

    /// Notes that the guest opens the node, whose status is told. Returns whether its kernel may keep
    /// what it has in its cache.
    pub fn keeps_cache(&self, number: u64, status: &Status) -> bool {
        let table = self.table();
        table.get(number).is_some_and(|known| known.cached.keep(status, SystemTime::now()))
    }

    /// Opens a name, by letting go of descriptors if there are too many.
    pub fn open_path(&self, folder: &File, name: &CStr) -> io::Result<File> {
        permitted(|| open_path(folder, name)).or_else(|error| match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                let gone = self.held().clear();
                drop(gone);
                permitted(|| open_path(folder, name))
            }
            _ => Err(error),
        })
    }

    /// Counts one more lookup of the file behind `path` (`O_PATH`), which was found at `name` in
    /// `folder`. `submount` says that it is a file system of its own to the guest.
    pub fn remember(
        &self,
        folder: &Node,
        name: &CStr,
        path: File,
        status: &Status,
        submount: bool,
    ) -> io::Result<Node> {
        let place = (folder.number, Arc::from(name));
        self.remember_at(Some(&place), folder, path, status, submount)
    }

    /// Counts one more lookup of a new file that has no name.
    pub fn remember_nameless(
        &self,
        folder: &Node,
        path: File,
        status: &Status,
    ) -> io::Result<Node> {
        self.remember_at(None, folder, path, status, false)
    }

    fn remember_at(
        &self,
        place: Option<&Place>,
        folder: &Node,
        path: File,
        status: &Status,
        submount: bool,
    ) -> io::Result<Node> {
        let identity = Identity::of(status);
        let path = Arc::new(path);
        let domain = (!submount).then(|| folder.domain.number());
        let alone = status.links() < 2;
        let mut verdict = None;
        for _ in 0..TRIES {
            let mut table = self.change();
            let found = place.map_or(Found::New, |place| table.find(place, &identity, domain));
            let told = |number| verdict.and_then(|(of, verdict)| (of == number).then_some(verdict));
            match (&found, place) {
                (Found::Same(number), _) => {
                    table.looked_up(*number);
                    drop(table);
                    return self.reached(*number, &path);
                }
                (Found::Like(number), Some(place)) if told(*number) == Some(Verdict::Same) => {
                    table.looked_up(*number);
                    table.put(place.clone(), *number, alone);
                    drop(table);
                    return self.reached(*number, &path);
                }
                (Found::Changed(number) | Found::Like(number), _) if told(*number).is_none() => {}
                (Found::Like(number), _) => {
                    let parted = told(*number) == Some(Verdict::Other) && !alone;
                    return self.add(table, place, folder, (path, status), submount, parted);
                }
                _ => return self.add(table, place, folder, (path, status), submount, false),
            }
            drop(table);
            // Compared without the lock, and looked for again.
            verdict = match found {
                Found::Changed(number) => {
                    let same = self.is_still(number, &identity, &path)?;
                    (!same).then_some((number, Verdict::Other))
                }
                Found::Like(number) => {
                    Some((number, self.compare(number, &identity, &path, alone)))
                }
                Found::Same(_) | Found::New => None,
            };
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    /// Compares a file that looks like node `number`, but was found elsewhere, with it.
    fn compare(&self, number: u64, identity: &Identity, path: &File, alone: bool) -> Verdict {
        let moved = (alone || identity.kind() == libc::S_IFDIR) && identity.has_birth();
        match self.get(number).and_then(|node| self.watcher.same_file(&node.file, path)) {
            Ok(true) => Verdict::Same,
            Ok(false) => Verdict::Other,
            // Moved on the host, if its number was not given to a new file. Of a file with several
            // names another may have been meant.
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) && moved => Verdict::Same,
            Err(_) => Verdict::Unknown,
        }
    }

    /// Returns how many further nodes may be remembered.
    pub fn room(&self) -> usize {
        self.limits.nodes.saturating_sub(self.table().len())
    }

    fn add(
        &self,
        mut table: RwLockWriteGuard<'_, Table>,
        place: Option<&Place>,
        folder: &Node,
        (path, status): (Arc<File>, &Status),
        submount: bool,
        parted: bool,
    ) -> io::Result<Node> {
        if table.len() >= self.limits.nodes {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let domain = if submount {
            let number = self.next_domain.fetch_add(1, Ordering::Relaxed);
            Arc::new(Domain::new(number, status.device))
        } else {
            Arc::clone(&folder.domain)
        };
        let identity = Identity::of(status);
        let number = table
            .add(place.cloned(), (identity, status.mount), domain, parted)
            .ok_or_else(stale)?;
        drop(table);
        self.reached(number, &path)
    }

    /// Notes the file's status after a change that may have copied it up.
    pub fn observe(&self, node: &Node, status: &Status) {
        let identity = Identity::of(status);
        let differs = {
            let table = self.table();
            table.get(node.number).is_some_and(|known| known.identity != identity)
        };
        if differs {
            self.change().changed(node.number, identity);
        }
    }

    /// Looks at what a name is before it is removed or renamed.
    pub fn before(&self, folder: &Node, name: &CStr) -> Before {
        let place = (folder.number, Arc::from(name));
        let number = self.table().at(&place);
        let node = number.and_then(|number| self.get(number).ok());
        Before { place, node }
    }

    /// Notes that the name was removed.
    pub fn removed(&self, before: Before) {
        let mut table = self.change();
        let descriptor = self.to_pin(&table, &before);
        table.take(&before.place, descriptor);
    }

    fn to_pin(&self, table: &Table, before: &Before) -> Option<Arc<File>> {
        let node = before.node.as_ref()?;
        (table.pinned() < self.limits.pinned).then(|| Arc::clone(&node.file))
    }

    /// Renames by `rename`, and follows it.
    pub fn rename(
        &self,
        from: (&Node, &CStr),
        to: (&Node, &CStr),
        exchange: bool,
        rename: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let (from, to) = (self.before(from.0, from.1), self.before(to.0, to.1));
        {
            let _alone = self.renames.write().unwrap_or_else(PoisonError::into_inner);
            rename()?;
            let mut table = self.change();
            let over = self.to_pin(&table, &to);
            table.moved(from.place, to.place, exchange, over);
        }
        // Moving copies up.
        for node in [from.node, to.node].into_iter().flatten() {
            if let Ok(status) = Status::of(&node.file) {
                self.observe(&node, &status);
            }
        }
        Ok(())
    }

    /// Takes back `lookups` lookups of each node; those the guest no longer knows are let go.
    pub fn forget(&self, list: impl IntoIterator<Item = (u64, u64)>) {
        let mut gone = Vec::new();
        {
            let mut table = self.change();
            for (number, lookups) in list {
                table.forget(number, lookups, &mut gone);
            }
            table.shrink();
        }
        let descriptors: Vec<_> = {
            let mut held = self.held();
            gone.iter().map(|(number, _)| held.remove(*number)).collect()
        };
        // Closing descriptors can take long.
        drop((gone, descriptors));
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let gone = self.change().clear();
        let held = self.held().clear();
        drop((gone, held));
    }
}
