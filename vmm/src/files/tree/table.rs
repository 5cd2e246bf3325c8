//! Nodes, their places and identities: the state, without any system call.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::cached::Cached;
use super::identity::{Domain, Identity};

/// The number of the shared folder itself (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// Places of one node that are remembered at most. A file with more names is found by these.
const MOST_PLACES: usize = 16;

/// A name in a directory: the directory's node and the name.
pub type Place = (u64, Arc<CStr>);

/// A file that the guest was told of.
#[derive(Debug)]
pub struct Known {
    /// The file as it was last seen.
    pub identity: Identity,
    /// The mount that it was found on first.
    pub mount: u64,
    /// The file system that it belongs to in the guest.
    pub domain: Arc<Domain>,
    /// How often the guest was told of it, less how often it forgot.
    lookups: u64,
    /// Places in this directory; while there are any, the node stays.
    children: u64,
    /// Where it was found, in the order in which it was. A directory has one place.
    pub places: Vec<Place>,
    /// What the guest's kernel may have in its cache.
    pub cached: Cached,
    /// The `O_PATH` descriptor of the file, as long as somebody else holds it.
    path: Mutex<Weak<File>>,
    /// Descriptors that were opened for the content, as long as somebody else holds them.
    open: Mutex<Vec<Weak<File>>>,
    /// A descriptor that is kept because the file has lost its last place.
    pinned: Option<Arc<File>>,
}

/// Nodes of one identity in one domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// This node alone: another name of the identity is compared with it.
    One(u64),
    /// So many nodes: names that look like links of one file are files of their own.
    Parted(u64),
}

/// What a name turns out to be.
#[derive(Debug)]
pub enum Found {
    /// The node that was there before.
    Same(u64),
    /// The node was there, but the file looks different.
    Changed(u64),
    /// Not known there, but this node looks the same.
    Like(u64),
    /// Nothing that is known.
    New,
}

/// All nodes.
#[derive(Debug)]
pub struct Table {
    known: HashMap<u64, Known>,
    places: HashMap<Place, u64>,
    identities: HashMap<(u64, Identity), Sharing>,
    next: u64,
    pinned: usize,
}

impl Known {
    fn new((identity, mount): (Identity, u64), domain: Arc<Domain>) -> Self {
        Self {
            identity,
            mount,
            domain,
            lookups: 1,
            children: 0,
            places: Vec::new(),
            cached: Cached::default(),
            path: Mutex::default(),
            open: Mutex::default(),
            pinned: None,
        }
    }

    /// Remembers the `O_PATH` descriptor of the file for as long as somebody holds it. Returns the
    /// one that is remembered, which is another if there was one.
    pub fn reached(&self, file: &Arc<File>) -> Arc<File> {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        path.upgrade().unwrap_or_else(|| {
            *path = Arc::downgrade(file);
            Arc::clone(file)
        })
    }

    /// Remembers a descriptor that was opened for the content for as long as somebody holds it.
    pub fn opened(&self, file: &Arc<File>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() == open.capacity() {
            open.retain(|file| file.strong_count() != 0);
        }
        open.push(Arc::downgrade(file));
    }

    /// Returns the `O_PATH` descriptor, if it is open.
    pub fn path(&self) -> Option<Arc<File>> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Returns any descriptor of the file that is open.
    pub fn descriptor(&self) -> Option<Arc<File>> {
        let open = || {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.iter().find_map(Weak::upgrade)
        };
        self.path().or_else(|| self.pinned.clone()).or_else(open)
    }

    fn is_folder(&self) -> bool {
        self.identity.kind() == libc::S_IFDIR
    }
}

impl Table {
    /// Only the root, which is never forgotten.
    pub fn new((identity, mount): (Identity, u64), domain: Arc<Domain>, root: Arc<File>) -> Self {
        let mut known = Known::new((identity, mount), Arc::clone(&domain));
        known.pinned = Some(root);
        let identities = HashMap::from([((domain.number(), identity), Sharing::One(ROOT))]);
        let known = HashMap::from([(ROOT, known)]);
        Self { known, places: HashMap::new(), identities, next: ROOT + 1, pinned: 0 }
    }

    /// Returns the number of nodes.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Returns the node of that number, if the guest may know it.
    pub fn get(&self, number: u64) -> Option<&Known> {
        self.known.get(&number)
    }

    /// Returns the node that was last found at a place.
    pub fn at(&self, place: &Place) -> Option<u64> {
        self.places.get(place).copied()
    }

    /// Looks for what was found at `place`. A `domain` is one that the file must belong to.
    pub fn find(&self, place: &Place, identity: &Identity, domain: Option<u64>) -> Found {
        if let Some(number) = self.at(place)
            && let Some(known) = self.known.get(&number)
        {
            if known.identity == *identity {
                return Found::Same(number);
            }
            if known.identity.kind() == identity.kind() {
                return Found::Changed(number);
            }
        }
        match domain.and_then(|domain| self.identities.get(&(domain, *identity))) {
            Some(Sharing::One(number)) if self.known.contains_key(number) => Found::Like(*number),
            _ => Found::New,
        }
    }

    /// Counts one more lookup.
    pub fn looked_up(&mut self, number: u64) {
        if let Some(known) = self.known.get_mut(&number) {
            known.lookups = known.lookups.saturating_add(1);
        }
    }

    /// Adds a node for a file that was found at `place`. `parted` says that the identity is not the
    /// file's alone.
    pub fn add(
        &mut self,
        place: Option<Place>,
        (identity, mount): (Identity, u64),
        domain: Arc<Domain>,
        parted: bool,
    ) -> Option<u64> {
        if place.as_ref().is_some_and(|place| !self.known.contains_key(&place.0)) {
            return None;
        }
        let number = self.next;
        self.next += 1;
        let key = (domain.number(), identity);
        self.known.insert(number, Known::new((identity, mount), domain));
        match self.identities.entry(key) {
            Entry::Occupied(mut sharing) => match sharing.get_mut() {
                Sharing::Parted(count) => *count += 1,
                Sharing::One(_) if parted => *sharing.get_mut() = Sharing::Parted(2),
                // The other is gone from where it was.
                Sharing::One(other) => *other = number,
            },
            Entry::Vacant(vacant) => {
                vacant.insert(Sharing::One(number));
            }
        }
        if let Some(place) = place {
            self.put(place, number, false);
        }
        Some(number)
    }

    /// Notes that the node was found at `place`; whatever else was there is not any more. `alone` says
    /// that this is the only place it can have.
    pub fn put(&mut self, place: Place, number: u64, alone: bool) {
        if self.at(&place) == Some(number) || !self.known.contains_key(&place.0) {
            return;
        }
        let Some(known) = self.known.get(&number) else { return };
        let alone = alone || known.is_folder();
        if !alone && known.places.len() >= MOST_PLACES {
            return self.take(&place, None);
        }
        let before = if alone { known.places.clone() } else { Vec::new() };
        // Before others are let go: they may hold it.
        if let Some(folder) = self.known.get_mut(&place.0) {
            folder.children += 1;
        }
        for other in &before {
            self.take(other, None);
        }
        self.take(&place, None);
        if let Some(known) = self.known.get_mut(&number) {
            known.places.push((place.0, Arc::clone(&place.1)));
            self.pinned -= usize::from(known.pinned.take().is_some());
        }
        self.places.insert(place, number);
    }

    /// Notes that nothing is at `place` any more. If the node that was has no other place,
    /// `descriptor` is kept for it.
    pub fn take(&mut self, place: &Place, descriptor: Option<Arc<File>>) {
        let Some(number) = self.places.remove(place) else { return };
        if let Some(known) = self.known.get_mut(&number) {
            known.places.retain(|one| one != place);
            if known.places.is_empty() && known.pinned.is_none() {
                self.pinned += usize::from(descriptor.is_some());
                known.pinned = descriptor;
            }
        }
        if let Some(folder) = self.known.get_mut(&place.0) {
            folder.children = folder.children.saturating_sub(1);
        }
        self.drop_unused(place.0, &mut Vec::new());
    }

    /// Returns how many descriptors are kept for files without a place.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// Follows a rename of what was known at `from`, and perhaps at `to`, before it.
    pub fn moved(&mut self, from: Place, to: Place, exchanged: bool, over: Option<Arc<File>>) {
        let (mover, other) = (self.at(&from), self.at(&to));
        // Names of one file: the host has done nothing.
        if mover.is_some() && mover == other {
            return;
        }
        // A directory that a place is in must not go while nothing is in it for a moment.
        for folder in [from.0, to.0] {
            self.hold(folder, 1);
        }
        self.take(&from, None);
        self.take(&to, if exchanged { None } else { over });
        if let Some(number) = mover {
            self.put((to.0, Arc::clone(&to.1)), number, false);
        }
        if let Some(number) = other.filter(|_| exchanged) {
            self.put((from.0, Arc::clone(&from.1)), number, false);
        }
        for folder in [from.0, to.0] {
            self.hold(folder, -1);
            self.drop_unused(folder, &mut Vec::new());
        }
    }

    fn hold(&mut self, folder: u64, change: i64) {
        if let Some(known) = self.known.get_mut(&folder) {
            known.children = known.children.saturating_add_signed(change);
        }
    }

    /// Notes that the file of the node is now of that identity: it was copied up, or made anew by the
    /// guest.
    pub fn changed(&mut self, number: u64, identity: Identity) {
        let Some(known) = self.known.get_mut(&number) else { return };
        if known.identity == identity {
            return;
        }
        let before = std::mem::replace(&mut known.identity, identity);
        let domain = known.domain.number();
        self.release_identity(number, (domain, before));
        self.identities.entry((domain, identity)).or_insert(Sharing::One(number));
    }

    fn release_identity(&mut self, number: u64, key: (u64, Identity)) {
        if let Entry::Occupied(mut sharing) = self.identities.entry(key) {
            match sharing.get_mut() {
                Sharing::One(other) if *other == number => drop(sharing.remove()),
                Sharing::Parted(count) if *count > 1 => *count -= 1,
                Sharing::Parted(_) => drop(sharing.remove()),
                Sharing::One(_) => {}
            }
        }
    }

    /// Takes back `lookups` lookups of a node, which is the guest's word; what is let go is added to
    /// `gone`.
    pub fn forget(&mut self, number: u64, lookups: u64, gone: &mut Vec<(u64, Known)>) {
        if number == ROOT {
            return;
        }
        if let Some(known) = self.known.get_mut(&number) {
            known.lookups = known.lookups.saturating_sub(lookups);
            self.drop_unused(number, gone);
        }
    }

    /// Removes a node that neither the guest nor a node below it needs, and so on upwards.
    fn drop_unused(&mut self, number: u64, gone: &mut Vec<(u64, Known)>) {
        let mut unused = vec![number];
        while let Some(number) = unused.pop() {
            let needed = |known: &Known| known.lookups > 0 || known.children > 0;
            if number == ROOT || self.known.get(&number).is_none_or(needed) {
                continue;
            }
            let Some(known) = self.known.remove(&number) else { continue };
            self.release_identity(number, (known.domain.number(), known.identity));
            self.pinned -= usize::from(known.pinned.is_some());
            for place in &known.places {
                self.places.remove(place);
                if let Some(folder) = self.known.get_mut(&place.0) {
                    folder.children = folder.children.saturating_sub(1);
                    unused.push(place.0);
                }
            }
            gone.push((number, known));
        }
    }

    /// Forgets all but the root. Numbers are not given again.
    pub fn clear(&mut self) -> Vec<Known> {
        let Some(root) = self.known.remove(&ROOT) else { return Vec::new() };
        let gone = self.known.drain().map(|(_, known)| known).collect();
        let key = (root.domain.number(), root.identity);
        self.known = HashMap::from([(ROOT, Known { children: 0, ..root })]);
        self.identities = HashMap::from([(key, Sharing::One(ROOT))]);
        self.places = HashMap::new();
        self.pinned = 0;
        gone
    }

    /// Returns memory that a large tree needed once.
    pub fn shrink(&mut self) {
        let count = self.known.len();
        if self.known.capacity() > 1024 + 4 * count {
            self.known.shrink_to(2 * count);
            self.places.shrink_to(2 * count);
            self.identities.shrink_to(2 * count);
        }
    }
}
