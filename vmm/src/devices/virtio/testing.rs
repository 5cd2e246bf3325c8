//! What the tests of devices share: wiring that only takes notes, and a driver's side of a queue.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use slog::{Discard, Logger, o};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ActiveQueue;
use crate::vm::{GuestMemory, MsiMessage, MsiVector, Wiring};

pub fn logger() -> Logger {
    Logger::root(Discard, o!())
}

/// An interrupt source that counts.
pub struct MockVector {
    event: EventFd,
    pub raised: AtomicU32,
    pub routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl MockVector {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            raised: AtomicU32::new(0),
            routes: Mutex::default(),
        })
    }

    pub fn take(&self) -> u32 {
        self.raised.swap(0, Ordering::SeqCst)
    }
}

impl MsiVector for MockVector {
    fn trigger(&self) -> io::Result<()> {
        self.raised.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        self.routes.lock().unwrap().push(message);
        Ok(())
    }
}

struct SharedVector(Arc<MockVector>);

impl MsiVector for SharedVector {
    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }

    fn event(&self) -> &EventFd {
        self.0.event()
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        self.0.route(message)
    }
}

/// Wiring that takes notes.
#[derive(Default)]
pub struct MockWiring {
    pub vectors: Mutex<Vec<Arc<MockVector>>>,
    pub notify: Mutex<Vec<(u64, EventFd)>>,
}

impl Wiring for MockWiring {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let vector = MockVector::new();
        self.vectors.lock().unwrap().push(Arc::clone(&vector));
        Ok(Box::new(SharedVector(vector)))
    }

    fn notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.notify.lock().unwrap().push((address, event.try_clone()?));
        Ok(())
    }

    fn unnotify(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.notify.lock().unwrap().retain(|(at, _)| *at != address);
        Ok(())
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The driver's side of a queue: rings from `base` on, taking 16 bytes per entry for descriptors.
pub struct DriverQueue {
    memory: Arc<GuestMemory>,
    base: u64,
    size: u16,
    pub interrupt: Arc<MockVector>,
    free: Vec<u16>,
    avail: u16,
    used: u16,
    links: Vec<Option<u16>>,
}

impl DriverQueue {
    pub fn new(memory: &Arc<GuestMemory>, base: u64, size: u16) -> Self {
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            interrupt: MockVector::new(),
            free: (0..size).rev().collect(),
            avail: 0,
            used: 0,
            links: vec![None; usize::from(size)],
        }
    }

    pub fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    pub fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's side, with EVENT_IDX.
    pub fn activate(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        ActiveQueue {
            queue,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn MsiVector>,
        }
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Offers a chain of (address, length) pieces; returns its head.
    pub fn offer(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let pieces: Vec<_> = readable
            .iter()
            .map(|&(address, len)| (address, len, 0))
            .chain(writable.iter().map(|&(address, len)| (address, len, WRITE)))
            .collect();
        let indices: Vec<u16> = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
        for (at, &(address, len, flags)) in pieces.iter().enumerate() {
            let next = indices.get(at + 1).copied();
            self.links[usize::from(indices[at])] = next;
            let entry = self.base + 16 * u64::from(indices[at]);
            self.write(address, entry);
            self.write(len, entry + 8);
            self.write(flags | if next.is_some() { NEXT } else { 0 }, entry + 12);
            self.write(next.unwrap_or(0), entry + 14);
        }
        self.publish(indices[0]);
        indices[0]
    }

    /// Puts a head into the available ring.
    pub fn publish(&mut self, head: u16) {
        self.write(head, self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size));
        self.avail = self.avail.wrapping_add(1);
        self.write(self.avail, self.avail_ring() + 2);
    }

    /// Takes back the next used chain: its head and the bytes written. Wants an interrupt for the
    /// next one.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        let used: u16 = self.memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if used == self.used {
            return None;
        }
        let entry = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        self.write(self.used, self.avail_ring() + 4 + 2 * u64::from(self.size));
        let head = u16::try_from(head).unwrap();
        let mut at = Some(head);
        while let Some(index) = at {
            self.free.push(index);
            at = self.links[usize::from(index)].take();
        }
        Some((head, len))
    }
}
