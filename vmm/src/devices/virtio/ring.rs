//! A queue at work: taking chains, giving them back, telling the guest.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::chain::{Chain, ChainError, Limits};
use super::state::QueuePosition;
use crate::vm::{GuestMemory, MsiVector};

/// A queue with the memory it lies in and the interrupt it raises.
pub struct Ring {
    queue: Queue,
    interrupt: Arc<dyn MsiVector>,
    memory: Arc<GuestMemory>,
    /// Chains were given back since the guest was last told.
    used: bool,
}

impl Ring {
    /// A ring on a queue that the transport has checked.
    pub fn new(queue: Queue, interrupt: Arc<dyn MsiVector>, memory: Arc<GuestMemory>) -> Self {
        Self { queue, interrupt, memory, used: false }
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
        let memory: &GuestMemory = &self.memory;
        let descriptors = self.queue.pop_descriptor_chain(memory)?;
        Some(chain.load(&self.memory, descriptors, limits))
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
        // It fails only for a head outside the table, which a guest may offer but nobody waits for.
        if self.queue.add_used(&*self.memory, head, len).is_ok() {
            self.used = true;
        }
    }

    /// Interrupts the guest if chains were given back and it wants to know.
    pub fn tell_guest(&mut self) -> std::io::Result<()> {
        if !std::mem::take(&mut self.used) {
            return Ok(());
        }
        if self.queue.needs_notification(&*self.memory).unwrap_or(true) {
            self.interrupt.trigger()?;
        }
        Ok(())
    }

    /// Asks to be told of new chains; `true` if some came meanwhile and nobody will tell.
    pub fn ask_for_kicks(&mut self) -> bool {
        self.queue.enable_notification(&*self.memory).unwrap_or(false)
    }

    /// Does without being told of new chains.
    pub fn decline_kicks(&mut self) {
        // Only a hint; it cannot fail on memory the transport has checked.
        let _ = self.queue.disable_notification(&*self.memory);
    }

    /// Where it stands.
    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }
}
