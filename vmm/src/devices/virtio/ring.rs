//! A queue at work: taking chains, giving them back, telling the guest.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError, Limits};
use super::state::QueuePosition;
use crate::vm::{LiveMemory, MemoryView, MsiVector};

/// A queue with the memory it lies in and the interrupt it raises.
pub struct Ring {
    queue: Queue,
    interrupt: Arc<dyn MsiVector>,
    memory: MemoryView,
    /// Up to where the guest has been told of chains given back.
    told: u16,
}

impl Ring {
    /// A ring on a queue that the transport has checked.
    pub fn new(queue: Queue, interrupt: Arc<dyn MsiVector>, memory: Arc<LiveMemory>) -> Self {
        let told = queue.next_used();
        Self { queue, interrupt, memory: MemoryView::new(memory), told }
    }

    /// Takes the next chain into `chain`. `None`: there is none; an error: there was one, it is
    /// bad, and it has been given back unused.
    pub fn pop(&mut self, chain: &mut Chain, limits: Limits) -> Option<Result<(), ChainError>> {
        let result = self.pop_any(chain, limits)?;
        if result.is_err() {
            self.give_back(chain.head(), 0);
        }
        Some(result)
    }

    /// As [`Ring::pop`], but a bad chain, too, is the caller's to give back.
    pub fn pop_any(&mut self, chain: &mut Chain, limits: Limits) -> Option<Result<(), ChainError>> {
        // Each chain is looked for in memory as it is now. If the rings themselves are not there any
        // more, which only a guest can bring about, the queue stands still.
        self.memory.refresh();
        let memory = self.memory.memory();
        let descriptors = self.queue.pop_descriptor_chain(&**memory)?;
        Some(chain.load(memory, descriptors, limits))
    }

    /// Undoes the last `count` pops; none of those chains may have been given back.
    pub fn unpop(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Gives a chain back with `len` bytes written into it.
    pub fn give_back(&mut self, head: u16, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        // It fails for a head outside the table, which a guest may offer but nobody waits for, and
        // for a ring that is not in memory any more.
        self.memory.refresh();
        let _ = self.queue.add_used(&**self.memory.memory(), head, len);
    }

    /// Gives several chains back in one piece: the guest sees all of them or none. The chains have
    /// been taken by [`Ring::pop`] with success, so that their heads lie in the table.
    pub fn give_back_together(&mut self, chains: impl ExactSizeIterator<Item = (u16, usize)>) {
        let last = chains.len().saturating_sub(1);
        for (index, (head, len)) in chains.enumerate() {
            if index == last {
                // Writes its own entry and makes all of them visible.
                return self.give_back(head, len);
            }
            let position = self.queue.next_used();
            let entry = 4 + 8 * u64::from(position % self.queue.size().max(1));
            let entry = GuestAddress(self.queue.used_ring().saturating_add(entry));
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let element = (u64::from(head) | u64::from(len) << 32).to_le();
            // The transport has checked that the ring lies in memory.
            let _ = self.memory.memory().write_obj(element, entry);
            self.queue.set_next_used(position.wrapping_add(1));
        }
    }

    /// Interrupts the guest if chains were given back and it wants to know.
    pub fn tell_guest(&mut self) -> std::io::Result<()> {
        let used = self.queue.next_used();
        let told = std::mem::replace(&mut self.told, used);
        if used != told && self.wants_interrupt(told, used) {
            self.interrupt.trigger()?;
        }
        Ok(())
    }

    /// Whether the guest wants an interrupt for the used entries from `told` on before `used`
    /// (virtio 1.2, section 2.7.7.2).
    fn wants_interrupt(&self, told: u16, used: u16) -> bool {
        // The entries must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        let load = |offset: u64| -> Option<u16> {
            let address = GuestAddress(self.queue.avail_ring().checked_add(offset)?);
            self.memory.memory().load(address, Ordering::Relaxed).ok().map(u16::from_le)
        };
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.queue.size()));
            return event.is_none_or(|event| {
                used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(told)
            });
        }
        let flags = load(0).map_or(0, u32::from);
        flags & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// Asks to be told of new chains; `true` if some came meanwhile and nobody will tell.
    pub fn ask_for_kicks(&mut self) -> bool {
        let more = self.queue.enable_notification(&**self.memory.memory()).unwrap_or(false);
        more && !self.is_mad()
    }

    /// The guest says that more chains are available than the ring has entries. None of them can be
    /// taken, so nobody should try again before the next kick.
    fn is_mad(&self) -> bool {
        let available = self.queue.avail_idx(&**self.memory.memory(), Ordering::Acquire);
        let ahead = |index: u16| index.wrapping_sub(self.queue.next_avail());
        available.is_ok_and(|index| ahead(index.0) > self.queue.size())
    }

    /// Does without being told of new chains.
    pub fn decline_kicks(&mut self) {
        // Only a hint.
        let _ = self.queue.disable_notification(&**self.memory.memory());
    }

    /// Where it stands.
    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::DriverQueue;
    use crate::vm::GuestMemory;

    const LIMITS: Limits = Limits { readable: 64, writable: 64 };

    fn ring(event_idx: bool) -> (Arc<GuestMemory>, DriverQueue, Ring) {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
        let driver = DriverQueue::new(&memory, 0x1000, 8);
        let mut queue = driver.activate().queue;
        queue.set_event_idx(event_idx);
        let interrupt = Arc::clone(&driver.interrupt) as Arc<dyn MsiVector>;
        let live = Arc::new((*memory).clone().into());
        let ring = Ring::new(queue, interrupt, live);
        (memory, driver, ring)
    }

    #[test]
    fn several_chains_come_back_in_one_piece() {
        let (_memory, mut driver, mut ring) = ring(true);
        let mut chain = Chain::default();
        // Across the end of the ring, which has 8 entries.
        for _ in 0..5 {
            let heads: Vec<u16> = (0..3)
                .map(|_| {
                    driver.offer(&[(0x8000, 8)], &[]);
                    ring.pop(&mut chain, LIMITS).unwrap().unwrap();
                    chain.head()
                })
                .collect();
            ring.give_back_together(heads.iter().enumerate().map(|(len, &head)| (head, len)));
            ring.tell_guest().unwrap();
            assert_eq!(driver.interrupt.take(), 1);
            for (len, head) in (0..).zip(heads) {
                assert_eq!(driver.take(), Some((head, len)));
            }
            assert_eq!(driver.take(), None);
        }
        ring.give_back_together(std::iter::empty::<(u16, usize)>().collect::<Vec<_>>().into_iter());
        ring.tell_guest().unwrap();
        assert_eq!(driver.interrupt.take(), 0);
    }

    #[test]
    fn an_index_far_ahead_is_no_reason_to_try_again() {
        let (memory, driver, mut ring) = ring(true);
        let mut chain = Chain::default();
        let index = GuestAddress(driver.avail_ring() + 2);
        for (ahead, more) in [(0_u16, false), (1, true), (8, true), (9, false), (0x9000, false)] {
            memory.write_obj(ahead, index).unwrap();
            assert_eq!(ring.ask_for_kicks(), more, "{ahead}");
        }
        assert!(ring.pop(&mut chain, LIMITS).is_none());
    }

    #[test]
    fn the_guest_is_told_as_it_wishes() {
        for event_idx in [false, true] {
            let (memory, mut driver, mut ring) = ring(event_idx);
            let mut chain = Chain::default();
            let mut serve = |driver: &mut DriverQueue| {
                driver.offer(&[(0x8000, 8)], &[]);
                ring.pop(&mut chain, LIMITS).unwrap().unwrap();
                ring.give_back(chain.head(), 0);
                ring.tell_guest().unwrap();
                driver.interrupt.take()
            };
            assert_eq!(serve(&mut driver), 1);
            // Not for the next three, or not at all.
            let flags = GuestAddress(driver.avail_ring());
            let event = GuestAddress(driver.avail_ring() + 4 + 16);
            memory.write_obj(1_u16, flags).unwrap();
            memory.write_obj(3_u16, event).unwrap();
            assert_eq!([serve(&mut driver), serve(&mut driver)], [0, 0]);
            memory.write_obj(0_u16, flags).unwrap();
            assert_eq!(serve(&mut driver), 1);
        }
    }
}
