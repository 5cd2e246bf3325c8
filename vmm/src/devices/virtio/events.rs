//! A device's queues in the event loop.
//!
//! Activation and reset come from vCPU threads, which have no hold on the event loop's interest
//! list. They leave here what is to change and raise an eventfd; the event loop changes the list.
//! All descriptors are edge-triggered: no read is needed per kick, and whoever stops before a queue
//! is empty calls [`QueueEvents::again`].

use std::io;

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The data word of events that belong to [`QueueEvents::process`]; queue `n` has `n`.
pub const CHANGED: u32 = u32::MAX;

/// The kick descriptors of a device's queues.
pub struct QueueEvents {
    changed: EventFd,
    /// Active, and whether the event loop knows.
    kicks: Vec<(EventFd, bool)>,
    /// Known to the event loop, but no longer active.
    retired: Vec<EventFd>,
}

impl QueueEvents {
    /// No queues yet.
    pub fn new() -> io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { changed, kicks: Vec::new(), retired: Vec::new() })
    }

    /// Queues have become active; from any thread.
    pub fn arm(&mut self, kicks: impl IntoIterator<Item = EventFd>) -> io::Result<()> {
        self.disarm();
        self.kicks = kicks.into_iter().map(|kick| (kick, false)).collect();
        self.changed.write(1)
    }

    /// All queues have gone; from any thread.
    pub fn disarm(&mut self) {
        let known = self.kicks.drain(..).filter(|(_, known)| *known).map(|(kick, _)| kick);
        self.retired.extend(known);
        self.again();
    }

    /// Has the device called again soon, for work it has put off.
    pub fn again(&self) {
        // A full counter means that the event is pending already.
        let _ = self.changed.write(1);
    }

    /// Registers the descriptor on which changes are announced.
    pub fn init(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&self.changed, CHANGED, EventSet::IN | EventSet::EDGE_TRIGGERED))
    }

    /// Brings the event loop up to date; on an event with [`CHANGED`].
    pub fn process(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        for kick in self.retired.drain(..) {
            ops.remove(Events::empty(&kick))?;
        }
        for (index, (kick, known)) in (0..).zip(&mut self.kicks) {
            if !*known {
                let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
                ops.add(Events::with_data(kick, index, set))?;
                *known = true;
            }
        }
        Ok(())
    }
}
