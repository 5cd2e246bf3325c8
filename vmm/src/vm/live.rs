//! Guest memory that may change while the machine runs.
//!
//! Nobody waits for a change: who holds a [`GuestMemory`] keeps what it looks into mapped, and takes
//! the new one at its next look.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::GuestMemory;

/// Guest memory as it is now; clones share it.
#[derive(Clone)]
pub struct LiveMemory {
    shared: Arc<Shared>,
}

struct Shared {
    /// How often it has changed; looked at without the lock.
    generation: AtomicU64,
    current: Mutex<Arc<GuestMemory>>,
    /// Held during a change.
    listeners: Mutex<Vec<Weak<dyn MemoryListener>>>,
}

/// Who has to be told of a change: the kernel's own devices do not look by themselves.
pub trait MemoryListener: Send + Sync {
    /// From now on this is guest memory. An error keeps it from changing.
    fn change(&self, memory: &Arc<GuestMemory>) -> io::Result<()>;
}

impl LiveMemory {
    /// Memory that has not changed yet.
    pub fn new(memory: GuestMemory) -> Self {
        let current = Mutex::new(Arc::new(memory));
        let generation = AtomicU64::new(0);
        Self { shared: Arc::new(Shared { generation, current, listeners: Mutex::default() }) }
    }

    /// As it is now.
    pub fn now(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.current())
    }

    /// Tells `listener` of guest memory as it is now, and of each change for as long as it lives.
    pub fn listen(&self, listener: &Arc<dyn MemoryListener>) -> io::Result<()> {
        let mut listeners = self.listeners();
        listener.change(&self.now())?;
        listeners.retain(|one| one.strong_count() > 0);
        listeners.push(Arc::downgrade(listener));
        Ok(())
    }

    /// From now on it is `memory`, unless a listener cannot follow.
    pub(super) fn replace(&self, memory: GuestMemory) -> io::Result<()> {
        let listeners = self.listeners();
        let (before, memory) = (self.now(), Arc::new(memory));
        let living = || listeners.iter().filter_map(Weak::upgrade);
        if let Err(error) = living().try_for_each(|one| one.change(&memory)) {
            for one in living() {
                // What it had before, it can have again.
                let _ = one.change(&before);
            }
            return Err(error);
        }
        let mut current = self.current();
        *current = memory;
        // Under the lock, so that a view's generation is that of what it took.
        self.shared.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Weak<dyn MemoryListener>>> {
        self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> MutexGuard<'_, Arc<GuestMemory>> {
        self.shared.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<GuestMemory> for LiveMemory {
    fn from(memory: GuestMemory) -> Self {
        Self::new(memory)
    }
}

/// One reader's hold on guest memory.
pub struct MemoryView {
    live: Arc<LiveMemory>,
    generation: u64,
    memory: Arc<GuestMemory>,
}

impl MemoryView {
    /// A view of memory as it is now.
    pub fn new(live: Arc<LiveMemory>) -> Self {
        let current = live.current();
        let memory = Arc::clone(&current);
        let generation = live.shared.generation.load(Ordering::Acquire);
        drop(current);
        Self { live, generation, memory }
    }

    /// Takes what it has become; unchanged, that is one load.
    pub fn refresh(&mut self) {
        if self.live.shared.generation.load(Ordering::Acquire) != self.generation {
            *self = Self::new(Arc::clone(&self.live));
        }
    }

    /// As it was at the last [`MemoryView::refresh`].
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemory as _};

    use super::*;

    #[test]
    fn a_view_takes_the_change_at_its_next_look() {
        let memory = |size| GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let live = LiveMemory::new(memory(0x1000));
        let mut view = MemoryView::new(Arc::new(live.clone()));
        let held = Arc::clone(view.memory());
        live.replace(memory(0x2000)).unwrap();
        assert_eq!(live.now().last_addr(), GuestAddress(0x1fff));
        assert_eq!(view.memory().last_addr(), GuestAddress(0xfff));
        view.refresh();
        assert_eq!(view.memory().last_addr(), GuestAddress(0x1fff));
        assert_eq!(held.last_addr(), GuestAddress(0xfff), "what is held stays");
    }

    /// Takes memory of up to so many bytes.
    struct Narrow(u64, Mutex<Vec<u64>>);

    impl MemoryListener for Narrow {
        fn change(&self, memory: &Arc<GuestMemory>) -> io::Result<()> {
            let size = memory.last_addr().0 + 1;
            if size > self.0 {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            self.1.lock().unwrap().push(size);
            Ok(())
        }
    }

    #[test]
    fn who_cannot_follow_keeps_it_as_it_is() {
        let memory = |size| GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let live = LiveMemory::new(memory(0x1000));
        let narrow = |most| Arc::new(Narrow(most, Mutex::default()));
        let (wide, slim, none) = (narrow(0x9000), narrow(0x2000), narrow(0));
        for one in [&wide, &slim] {
            live.listen(&(Arc::clone(one) as Arc<dyn MemoryListener>)).unwrap();
        }
        assert!(live.listen(&(none as Arc<dyn MemoryListener>)).is_err());
        live.replace(memory(0x2000)).unwrap();
        assert!(live.replace(memory(0x3000)).is_err());
        assert_eq!(live.now().last_addr(), GuestAddress(0x1fff));
        assert_eq!(
            *wide.1.lock().unwrap(),
            [0x1000, 0x2000, 0x3000, 0x2000],
            "told of the way back"
        );
        drop(slim);
        live.replace(memory(0x3000)).unwrap();
    }
}
