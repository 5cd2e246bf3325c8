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
use super::table::{Found, Known, Opened, Spot, Table};
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
    /// Whether the host refuses to write by the mount that `file` was opened on.
    read_only: bool,
    /// The file system that it belongs to in the guest.
    pub domain: Arc<Domain>,
    /// The mount that it was found on; of several one that the host lets write to.
    pub mount: u64,
    /// Whether it is a file that is mounted somewhere: no name leads to it there.
    pub is_bound: bool,
    /// `S_IFMT` bits; they never change.
    kind: u32,
}

impl Node {
    fn of(number: u64, known: &Known, (file, read_only): Opened) -> Self {
        Self {
            number,
            file,
            read_only,
            domain: Arc::clone(&known.domain),
            mount: known.mount,
            is_bound: known.is_bound(),
            kind: known.identity.kind(),
        }
    }

    /// A folder or a regular file: what may be opened for its content.
    pub fn may_be_opened(&self) -> bool {
        matches!(self.kind, libc::S_IFREG | libc::S_IFDIR)
    }

    /// Returns the descriptor.
    pub fn opened(&self) -> Opened {
        (Arc::clone(&self.file), self.read_only)
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
    pub(super) renames: RwLock<()>,
    next_domain: AtomicU64,
    root_mount: u64,
    pub(super) limits: Limits,
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

/// What begins at a file for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Border {
    /// Nothing.
    None,
    /// The file system of a mount.
    Mount,
    /// The file system that volumes of one device are parts of.
    Group,
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
    pub(super) fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self) -> RwLockWriteGuard<'_, Table> {
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
        if let Some(node) = self.at_hand(number, false)? {
            return Ok(node);
        }
        let walked = self.walk(number).or_else(|_| {
            // A rename may have been between the host and the table.
            let _still = self.renames.read().unwrap_or_else(PoisonError::into_inner);
            self.walk(number)
        });
        walked.or_else(|error| self.at_hand(number, true)?.ok_or(error))
    }

    /// Returns the node if a descriptor of it is open. `any` says that it may be one of a mount where the
    /// host refuses what another allows.
    fn at_hand(&self, number: u64, any: bool) -> io::Result<Option<Node>> {
        let path = {
            let table = self.table();
            let known = table.get(number).ok_or_else(stale)?;
            let path = known.path();
            let found = if any { known.descriptor() } else { known.full_descriptor() };
            let Some(found) = found else { return Ok(None) };
            let is_path = path.is_some_and(|(path, _)| Arc::ptr_eq(&path, &found.0));
            let node = Node::of(number, known, found);
            if !is_path {
                return Ok(Some(node));
            }
            node
        };
        self.keep(&path);
        Ok(Some(path))
    }

    /// Returns `node` by a place on `mount` if it has one there: linking needs both names on one mount.
    pub fn on_mount(&self, node: Node, mount: u64) -> Node {
        let spots = match self.table().get(node.number) {
            Some(known) if known.is_spread => known.places.clone(),
            _ => return node,
        };
        if Status::of(&node.file).is_ok_and(|status| status.mount == mount) {
            return node;
        }
        let mut files = spots.into_iter().filter(|spot| spot.mount == mount).map(|spot| {
            let folder = self.folder(spot.place.0)?;
            self.open_step(&folder, &spot, node.number)
        });
        match files.find_map(Result::ok) {
            Some((file, read_only)) => Node { file, read_only, ..node },
            None => node,
        }
    }

    /// Keeps the node's `O_PATH` descriptor, as it was used.
    fn keep(&self, node: &Node) {
        let gone = self.held().keep(node.number, &node.file);
        // Without the lock.
        drop(gone);
    }

    /// Opens the node by one of the places where it was found.
    fn walk(&self, number: u64) -> io::Result<Node> {
        let spots = self.table().get(number).ok_or_else(stale)?.places.clone();
        let mut result = Err(stale());
        for spot in spots {
            let folder = self.folder(spot.place.0);
            result = folder.and_then(|folder| self.step(&folder, &spot, number));
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
            if let Some(node) = self.at_hand(at, true)? {
                break node;
            }
            let table = self.table();
            let spot = table.get(at).and_then(|known| known.places.first()).ok_or_else(stale)?;
            // Longer than all nodes is a circle, of moves on the host that were seen in another order.
            if way.len() > table.len() {
                return Err(stale());
            }
            way.push((at, spot.clone()));
            at = spot.place.0;
        };
        for (number, spot) in way.into_iter().rev() {
            node = self.step(&node, &spot, number)?;
        }
        Ok(node)
    }

    /// Opens one name, which must lead to the node that it led to before.
    fn step(&self, folder: &Node, spot: &Spot, number: u64) -> io::Result<Node> {
        self.reached(number, &self.open_step(folder, spot, number)?)
    }

    fn open_step(&self, folder: &Node, spot: &Spot, number: u64) -> io::Result<Opened> {
        let path = Arc::new(self.open_path(&folder.file, &spot.place.1)?);
        let identity = Identity::of(&Status::of(&path)?);
        let same = self.table().get(number).ok_or_else(stale)?.identity == identity;
        if !same && !self.is_still(number, &identity, &path)? {
            return Err(stale());
        }
        Ok((path, spot.read_only))
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
                && descriptor.is_some_and(|(file, _)| self.watcher.same_inode(&file, path).unwrap_or(false));
        if same {
            self.change().changed(number, *now);
        }
        Ok(same)
    }

    /// Notes the node's `O_PATH` descriptor, and keeps it as long as it is used.
    fn reached(&self, number: u64, path: &Opened) -> io::Result<Node> {
        let node = {
            let table = self.table();
            let known = table.get(number).ok_or_else(stale)?;
            Node::of(number, known, known.reached(path))
        };
        self.keep(&node);
        Ok(node)
    }

    /// Notes a descriptor that was opened for the content, and is somebody else's.
    pub fn opened(&self, node: &Node, file: &Arc<File>) -> io::Result<()> {
        let opened = (Arc::clone(file), node.read_only);
        self.table().get(node.number).ok_or_else(stale)?.opened(&opened);
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
    /// `folder`, on a mount that is read-only or not.
    pub fn remember(
        &self,
        folder: &Node,
        name: &CStr,
        path: File,
        status: &Status,
        (border, read_only): (Border, bool),
    ) -> io::Result<Node> {
        let spot = Spot {
            place: (folder.number, Arc::from(name)),
            mount: status.mount,
            read_only,
            is_root: status.mount != folder.mount,
        };
        self.remember_at(Some(&spot), folder, path, status, border)
    }

    /// Counts one more lookup of a new file that has no name.
    pub fn remember_nameless(
        &self,
        folder: &Node,
        path: File,
        status: &Status,
    ) -> io::Result<Node> {
        self.remember_at(None, folder, path, status, Border::None)
    }

    fn remember_at(
        &self,
        spot: Option<&Spot>,
        folder: &Node,
        path: File,
        status: &Status,
        border: Border,
    ) -> io::Result<Node> {
        let identity = Identity::of(status);
        let path = (Arc::new(path), spot.is_some_and(|spot| spot.read_only));
        // A mount's root is found in one place.
        let own = border != Border::None || status.is_folder() && status.mount != folder.mount;
        let domain = (!own).then(|| folder.domain.number());
        let alone = status.links() < 2;
        let (mut verdict, mut gone) = (None, None);
        for _ in 0..TRIES {
            let mut table = self.change();
            let found =
                spot.map_or(Found::New, |spot| table.find(&spot.place, &identity, domain, gone));
            let told = |number| verdict.and_then(|(of, verdict)| (of == number).then_some(verdict));
            match (&found, spot) {
                (Found::Same(number), _) => {
                    table.looked_up(*number);
                    drop(table);
                    return self.reached(*number, &path);
                }
                (Found::Like(number), Some(spot)) if told(*number) == Some(Verdict::Same) => {
                    table.looked_up(*number);
                    table.put(spot.clone(), *number, alone);
                    drop(table);
                    return self.reached(*number, &path);
                }
                (Found::Changed(_), _) => {}
                (Found::Like(number), _) if told(*number).is_none() => {}
                (Found::Like(number), _) => {
                    let parted = told(*number) == Some(Verdict::Other) && !alone;
                    return self.add(table, spot, folder, (path, status), border, parted);
                }
                (Found::New, _) => {
                    return self.add(table, spot, folder, (path, status), border, false);
                }
            }
            drop(table);
            // Compared without the lock, and looked for again.
            match found {
                Found::Changed(number) if self.is_still(number, &identity, &path.0)? => {}
                Found::Changed(number) => gone = Some(number),
                Found::Like(number) => {
                    verdict = Some((number, self.compare(number, &identity, &path.0, alone)));
                }
                Found::Same(_) | Found::New => {}
            }
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
        spot: Option<&Spot>,
        folder: &Node,
        (path, status): (Opened, &Status),
        border: Border,
        parted: bool,
    ) -> io::Result<Node> {
        if table.len() >= self.limits.nodes {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let next = || self.next_domain.fetch_add(1, Ordering::Relaxed);
        let domain = match border {
            Border::None => Arc::clone(&folder.domain),
            Border::Mount => Arc::new(Domain::new(next(), status.device)),
            Border::Group => Arc::new(Domain::group(next())),
        };
        let file = (Identity::of(status), status.mount);
        let number = table.add(spot.cloned(), file, domain, parted).ok_or_else(stale)?;
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
