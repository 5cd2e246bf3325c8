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

/// A place where a file was found, with the mount that the file is on there.
#[derive(Debug, Clone)]
pub struct Spot {
    /// The name.
    pub place: Place,
    /// The mount's id.
    pub mount: u64,
    /// Whether the host refuses to write by this mount.
    pub read_only: bool,
    /// Whether the file is the mount's root.
    pub is_root: bool,
}

/// A descriptor, and whether the host refuses to write by the mount that it was opened on.
pub type Opened = (Arc<File>, bool);

/// Domain and identity: the same for all names that may be one node.
type Key = (u64, Identity);

/// A file that the guest was told of.
#[derive(Debug)]
pub struct Known {
    /// The file as it was last seen.
    pub identity: Identity,
    /// The mount that is used to reach it: of the first of its places, if it has any.
    pub mount: u64,
    /// The file system that it belongs to in the guest.
    pub domain: Arc<Domain>,
    /// How often the guest was told of it, less how often it forgot.
    lookups: u64,
    /// Places in this directory; while there are any, the node stays.
    children: u64,
    /// Where it was found: on writable mounts first, and then in the order in which it was. A directory
    /// has one place.
    pub places: Vec<Spot>,
    /// Whether it was found on several mounts. Then not every descriptor of it serves for everything: what
    /// one mount refuses another may allow.
    pub is_spread: bool,
    /// What the guest's kernel may have in its cache.
    pub cached: Cached,
    /// The `O_PATH` descriptor of the file, as long as somebody else holds it.
    path: Mutex<(Weak<File>, bool)>,
    /// Descriptors that were opened for the content, as long as somebody else holds them.
    open: Mutex<Vec<(Weak<File>, bool)>>,
    /// A descriptor that is kept because the file has lost its last place.
    pinned: Option<Opened>,
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
    identities: HashMap<Key, Sharing>,
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
            is_spread: false,
            cached: Cached::default(),
            path: Mutex::default(),
            open: Mutex::default(),
            pinned: None,
        }
    }

    /// Remembers the `O_PATH` descriptor of the file for as long as somebody holds it. Returns the
    /// one that is remembered, which is another if there was one that serves for as much.
    pub fn reached(&self, (file, read_only): &Opened) -> Opened {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        let before = path.0.upgrade().map(|before| (before, path.1));
        match before {
            Some(before) if !before.1 || *read_only => before,
            // The next one to look is to find a place that can be written to.
            None if *read_only && self.is_writable() => (Arc::clone(file), true),
            _ => {
                *path = (Arc::downgrade(file), *read_only);
                (Arc::clone(file), *read_only)
            }
        }
    }

    /// Remembers a descriptor that was opened for the content for as long as somebody holds it.
    pub fn opened(&self, (file, read_only): &Opened) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() == open.capacity() {
            open.retain(|(file, _)| file.strong_count() != 0);
        }
        open.push((Arc::downgrade(file), *read_only));
    }

    /// Returns the `O_PATH` descriptor, if it is open.
    pub fn path(&self) -> Option<Opened> {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        path.0.upgrade().map(|file| (file, path.1))
    }

    /// Returns any descriptor of the file that is open.
    pub fn descriptor(&self) -> Option<Opened> {
        self.descriptor_that(|_| true)
    }

    /// Returns a descriptor of the file that is open, and can be written by if a place of the file can.
    pub fn full_descriptor(&self) -> Option<Opened> {
        self.descriptor_that(|read_only| !read_only || !self.is_writable())
    }

    fn descriptor_that(&self, fits: impl Fn(bool) -> bool) -> Option<Opened> {
        let fitting = |opened: &Opened| fits(opened.1);
        let open = || {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let mut open = open.iter().filter(|(_, read_only)| fits(*read_only));
            open.find_map(|(file, read_only)| Some((file.upgrade()?, *read_only)))
        };
        let pinned = || self.pinned.clone().filter(fitting);
        self.path().filter(fitting).or_else(pinned).or_else(open)
    }

    /// Whether there is a place where it can be written to.
    fn is_writable(&self) -> bool {
        self.places.first().is_some_and(|spot| !spot.read_only)
    }

    /// Whether it is a file that is mounted.
    pub fn is_bound(&self) -> bool {
        !self.is_folder() && self.places.iter().any(|spot| spot.is_root)
    }

    fn is_folder(&self) -> bool {
        self.identity.kind() == libc::S_IFDIR
    }

    fn key(&self) -> Key {
        (self.domain.number(), self.identity)
    }

    /// Returns which places a further one replaces. `alone` says that the file has no other on its mount.
    fn replaced_by(&self, spot: &Spot, alone: bool) -> Vec<Place> {
        let place = |spot: &Spot| spot.place.clone();
        let mut same_mount = self.places.iter().filter(|other| other.mount == spot.mount);
        if self.is_folder() {
            self.places.iter().map(place).collect()
        } else if alone {
            same_mount.map(place).collect()
        } else if self.places.len() >= MOST_PLACES {
            same_mount.next().or(self.places.first()).map(place).into_iter().collect()
        } else {
            Vec::new()
        }
    }

    fn add_place(&mut self, spot: Spot) {
        let at = self.places.iter().position(|other| other.read_only && !spot.read_only);
        self.is_spread |= spot.mount != self.mount;
        self.places.insert(at.unwrap_or(self.places.len()), spot);
        self.follow_places();
    }

    fn remove_place(&mut self, place: &Place) {
        self.places.retain(|spot| spot.place != *place);
        self.follow_places();
    }

    fn follow_places(&mut self) {
        self.mount = self.places.first().map_or(self.mount, |spot| spot.mount);
    }
}

impl Table {
    /// Only the root, which is never forgotten.
    pub fn new((identity, mount): (Identity, u64), domain: Arc<Domain>, root: Arc<File>) -> Self {
        let mut known = Known::new((identity, mount), domain);
        known.pinned = Some((root, false));
        let identities = HashMap::from([(known.key(), Sharing::One(ROOT))]);
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

    /// Looks for what was found at `place`, where node `gone` is not any more. `domain` is the one that the
    /// file belongs to if it is known from another place; `None` if it cannot be.
    pub fn find(
        &self,
        place: &Place,
        identity: &Identity,
        domain: Option<u64>,
        gone: Option<u64>,
    ) -> Found {
        if let Some(number) = self.at(place).filter(|number| Some(*number) != gone)
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

    /// Adds a node for a file that was found at `spot`. `parted` says that the identity is not the file's
    /// alone.
    pub fn add(
        &mut self,
        spot: Option<Spot>,
        (identity, mount): (Identity, u64),
        domain: Arc<Domain>,
        parted: bool,
    ) -> Option<u64> {
        if spot.as_ref().is_some_and(|spot| !self.known.contains_key(&spot.place.0)) {
            return None;
        }
        let number = self.next;
        self.next += 1;
        let known = Known::new((identity, mount), domain);
        let key = known.key();
        self.known.insert(number, known);
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
        if let Some(spot) = spot {
            self.put(spot, number, false);
        }
        Some(number)
    }

    /// Notes that the node was found at `spot`; whatever else was there is not any more. `alone` says
    /// that this is the only place it can have on that mount.
    pub fn put(&mut self, spot: Spot, number: u64, alone: bool) {
        let place = spot.place.clone();
        if self.at(&place) == Some(number) || !self.known.contains_key(&place.0) {
            return;
        }
        let Some(known) = self.known.get(&number) else { return };
        let before = known.replaced_by(&spot, alone);
        // Before others are let go: they may hold it.
        self.hold(place.0, 1);
        for other in &before {
            self.take(other, None, false);
        }
        self.take(&place, None, false);
        if let Some(known) = self.known.get_mut(&number) {
            known.add_place(spot);
            self.pinned -= usize::from(known.pinned.take().is_some());
        }
        self.places.insert(place, number);
    }

    /// Notes that nothing is at `place` any more. If the node that was has no other place, or `unlinked`
    /// says that the file has no name left, `descriptor` is kept for it.
    pub fn take(&mut self, place: &Place, descriptor: Option<Opened>, unlinked: bool) {
        let Some(number) = self.places.remove(place) else { return };
        if let Some(known) = self.known.get_mut(&number) {
            known.remove_place(place);
            if (known.places.is_empty() || unlinked) && known.pinned.is_none() {
                self.pinned += usize::from(descriptor.is_some());
                known.pinned = descriptor;
            }
        }
        self.hold(place.0, -1);
        self.drop_unused(place.0, &mut Vec::new());
    }

    /// Returns how many descriptors are kept for files without a place.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    /// Follows a rename of what was known at `from`, and perhaps at `to`, before it. `over` is kept for
    /// what was at `to`, as by [`Table::take`].
    pub fn moved(&mut self, from: Place, to: Place, exchanged: bool, over: (Option<Opened>, bool)) {
        let (mover, other) = (self.spot_at(&from), self.spot_at(&to));
        let number = |found: &Option<(u64, Spot)>| found.as_ref().map(|(number, _)| *number);
        // Names of one file: the host has done nothing.
        if mover.is_some() && number(&mover) == number(&other) {
            return;
        }
        // A directory that a place is in must not go while nothing is in it for a moment.
        for folder in [from.0, to.0] {
            self.hold(folder, 1);
        }
        self.take(&from, None, false);
        let (descriptor, unlinked) = if exchanged { (None, false) } else { over };
        self.take(&to, descriptor, unlinked);
        if let Some((number, spot)) = mover {
            self.put(Spot { place: to.clone(), ..spot }, number, false);
        }
        if let Some((number, spot)) = other.filter(|_| exchanged) {
            self.put(Spot { place: from.clone(), ..spot }, number, false);
        }
        for folder in [from.0, to.0] {
            self.hold(folder, -1);
            self.drop_unused(folder, &mut Vec::new());
        }
    }

    fn spot_at(&self, place: &Place) -> Option<(u64, Spot)> {
        let number = self.at(place)?;
        let spot = self.known.get(&number)?.places.iter().find(|spot| spot.place == *place)?;
        Some((number, spot.clone()))
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
        let before = known.key();
        known.identity = identity;
        let now = known.key();
        self.release_identity(number, before);
        self.identities.entry(now).or_insert(Sharing::One(number));
    }

    fn release_identity(&mut self, number: u64, key: Key) {
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
            self.release_identity(number, known.key());
            self.pinned -= usize::from(known.pinned.is_some());
            for Spot { place, .. } in &known.places {
                self.places.remove(place);
                self.hold(place.0, -1);
                unused.push(place.0);
            }
            gone.push((number, known));
        }
    }

    /// Forgets all but the root. Numbers are not given again.
    pub fn clear(&mut self) -> Vec<Known> {
        let Some(root) = self.known.remove(&ROOT) else { return Vec::new() };
        let gone = self.known.drain().map(|(_, known)| known).collect();
        let key = root.key();
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
