//! The files that the guest remembers.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use super::open::Cached;
use super::system::Status;

/// The number of the shared folder itself (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// What makes two descriptors the same file. The mount counts: the same file bound to two places is
/// two nodes, as each place has its own parent and may be read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The mount it was reached through.
    pub mount: u64,
    device: u64,
    inode: u64,
}

/// A file held by an `O_PATH` descriptor, so that its inode number cannot be given to another.
#[derive(Debug)]
pub struct Node {
    /// The descriptor.
    pub file: File,
    /// Its identity.
    pub key: Key,
    /// `S_IFMT` bits; they never change.
    kind: u32,
    /// What the guest's kernel may have in its cache.
    pub cached: Cached,
}

impl Node {
    /// Holds `file` (`O_PATH`), of which `status` is told.
    pub fn new(file: File, status: &Status) -> Self {
        let key = Key { mount: status.mount, device: status.device, inode: status.inode() };
        Self { file, key, kind: status.mode() & libc::S_IFMT, cached: Cached::default() }
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
pub struct Nodes {
    state: RwLock<State>,
    root_mount: u64,
}

struct State {
    known: HashMap<u64, Known>,
    numbers: HashMap<Key, u64>,
    next: u64,
}

struct Known {
    node: Arc<Node>,
    /// How often the guest was told of it, less how often it forgot.
    lookups: u64,
}

impl Nodes {
    /// Only the root, which is never forgotten.
    pub fn new(root: Node) -> Self {
        let root_mount = root.key.mount;
        let numbers = HashMap::from([(root.key, ROOT)]);
        let known = HashMap::from([(ROOT, Known { node: Arc::new(root), lookups: 1 })]);
        Self { state: RwLock::new(State { known, numbers, next: ROOT + 1 }), root_mount }
    }

    /// The mount that the shared folder itself is on.
    pub fn root_mount(&self) -> u64 {
        self.root_mount
    }

    /// The node of that number, if the guest may know it.
    pub fn get(&self, number: u64) -> io::Result<Arc<Node>> {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let known = state.known.get(&number);
        known
            .map(|known| Arc::clone(&known.node))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// Counts one more lookup of the file; its number.
    pub fn remember(&self, file: File, status: &Status) -> u64 {
        let node = Node::new(file, status);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = state.numbers.get(&node.key).copied()
            && let Some(known) = state.known.get_mut(&number)
        {
            known.lookups = known.lookups.saturating_add(1);
            return number;
        }
        let number = state.next;
        state.next += 1;
        state.numbers.insert(node.key, number);
        state.known.insert(number, Known { node: Arc::new(node), lookups: 1 });
        number
    }

    /// Takes back `lookups` lookups of each node; those the guest no longer knows are let go.
    pub fn forget(&self, list: impl IntoIterator<Item = (u64, u64)>) {
        let mut gone = Vec::new();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for (number, lookups) in list {
            let Some(known) = state.known.get_mut(&number).filter(|_| number != ROOT) else {
                continue;
            };
            // The count is the guest's word.
            known.lookups = known.lookups.saturating_sub(lookups);
            if known.lookups == 0
                && let Some(known) = state.known.remove(&number)
            {
                state.numbers.remove(&known.node.key);
                gone.push(known);
            }
        }
        state.shrink();
        // Closing descriptors can take long.
        drop(state);
        drop(gone);
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.known.retain(|number, _| *number == ROOT);
        state.numbers.retain(|_, number| *number == ROOT);
        state.shrink();
    }
}

impl State {
    /// A guest that walked a large tree once should not cost its memory for ever.
    fn shrink(&mut self) {
        let count = self.known.len();
        if self.known.capacity() > 1024 + 4 * count {
            self.known.shrink_to(2 * count);
            self.numbers.shrink_to(2 * count);
        }
    }
}
