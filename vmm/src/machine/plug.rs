//! Where virtio devices are plugged in and taken out, at build and while the guest runs.
//!
//! A device is in two places: on the PCI bus, where the vCPUs find it, and in the event loop. The
//! event loop cannot be changed from within one of its own calls, where the requests to plug come
//! from, so what is to change there waits until [`Plug::settle`] between two turns of it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{MutEventSubscriber, SubscriberId, SubscriberOps};
use slog::Logger;

use super::EventLoop;
use crate::bus::pci::{PciBus, PciError};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::transport::pci::{BAR_SIZE, TransportError, VirtioPci};
use crate::vm::{LiveMemory, Wiring};

/// Why a device cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The bus has no place for it.
    #[error(transparent)]
    Bus(#[from] PciError),
    /// It does not get behind the transport.
    #[error("a virtio device")]
    Transport(#[from] TransportError),
}

/// The place of devices.
pub struct Plug {
    memory: LiveMemory,
    wiring: Arc<dyn Wiring>,
    pci: Arc<PciBus>,
    next: Cell<u64>,
    waiting: RefCell<Vec<Change>>,
    /// The event loop's own numbers.
    subscribers: RefCell<HashMap<u64, SubscriberId>>,
}

enum Change {
    Add(u64, Box<dyn MutEventSubscriber>),
    Remove(u64),
}

/// A device that is plugged in. Dropping this leaves it where it is.
pub struct Plugged {
    slot: u8,
    subscriber: u64,
    function: Arc<Mutex<VirtioPci>>,
}

impl Plugged {
    /// Tells the guest that the device's configuration has changed.
    pub fn config_changed(&self) {
        self.function.lock().unwrap_or_else(PoisonError::into_inner).config_changed();
    }
}

impl Plug {
    /// No devices yet.
    pub fn new(memory: LiveMemory, wiring: Arc<dyn Wiring>, pci: Arc<PciBus>) -> Self {
        Self {
            memory,
            wiring,
            pci,
            next: Cell::new(0),
            waiting: RefCell::default(),
            subscribers: RefCell::default(),
        }
    }

    /// Plugs a device in. A guest that runs already finds it when it scans the bus again.
    pub fn add<D>(&self, device: Arc<Mutex<D>>, logger: Logger) -> Result<Plugged, PlugError>
    where
        D: VirtioDevice + MutEventSubscriber + 'static,
    {
        let address = self.pci.allocate(BAR_SIZE)?;
        let memory = self.memory.clone();
        let (wiring, device_side) = (self.wiring.clone(), device.clone());
        let function = match VirtioPci::new(device_side, memory, wiring, address, logger) {
            Ok(function) => Arc::new(Mutex::new(function)),
            Err(error) => {
                self.pci.release(address, BAR_SIZE);
                return Err(error.into());
            }
        };
        let slot = match self.pci.add(function.clone()) {
            Ok(slot) => slot,
            Err(error) => {
                function.lock().unwrap_or_else(PoisonError::into_inner).unplug();
                self.pci.release(address, BAR_SIZE);
                return Err(error.into());
            }
        };
        let subscriber = self.next.get();
        self.next.set(subscriber + 1);
        self.waiting.borrow_mut().push(Change::Add(subscriber, Box::new(device)));
        Ok(Plugged { slot, subscriber, function })
    }

    /// Takes a device out. A driver that has not let go of it finds all ones in its registers, and
    /// its requests stay unanswered.
    pub fn remove(&self, plugged: &Plugged) {
        self.pci.remove(plugged.slot);
        plugged.function.lock().unwrap_or_else(PoisonError::into_inner).unplug();
        self.waiting.borrow_mut().push(Change::Remove(plugged.subscriber));
    }

    /// Brings the event loop up to date; between two turns of it.
    pub fn settle(&self, events: &mut EventLoop) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        let mut subscribers = self.subscribers.borrow_mut();
        for change in waiting {
            match change {
                Change::Add(number, subscriber) => {
                    subscribers.insert(number, events.add_subscriber(subscriber));
                }
                Change::Remove(number) => {
                    // It was added once and is removed once.
                    if let Some(id) = subscribers.remove(&number) {
                        drop(events.remove_subscriber(id));
                    }
                }
            }
        }
    }
}
