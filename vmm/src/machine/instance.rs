//! A machine that has been built.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_control::{MemorySize, Metrics};
use slog::{Logger, warn};

use super::memory::Growth;
use super::network::{NetworkError, NetworkParts, Networks};
use super::plug::Plug;
use super::{BuildError, EventLoop, chain};
use crate::devices::legacy::Serial;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::vsock::Vsock;
use crate::vcpu::{BootEntry, Shared, VcpuError, VcpuHandle, create_vcpu};
use crate::vm::Vm;

/// A machine whose vCPUs have threads; they wait until [`Machine::resume`].
pub struct Machine {
    // Dropped first: their threads end before what they use goes.
    pub(super) vcpus: RefCell<Vec<VcpuHandle>>,
    pub(super) running: Cell<bool>,
    pub(super) shared: Arc<Shared>,
    pub(super) serial: Option<Arc<Mutex<Serial>>>,
    pub(super) vsock: Arc<Mutex<Vsock>>,
    pub(super) fs: Option<Arc<Mutex<Fs>>>,
    /// How the guest gets more memory, if it can.
    pub(super) memory: Option<Growth>,
    /// What it was booted with.
    pub(super) memory_mib: u64,
    pub(super) max_vcpus: u8,
    pub(super) entry: BootEntry,
    pub(super) networks: Networks,
    pub(super) plug: Plug,
    pub(super) logger: Logger,
    /// Keeps the guest's memory mapped.
    pub(super) vm: Vm,
}

impl Machine {
    /// Lets all vCPUs run.
    pub fn resume(&self) -> Result<(), VcpuError> {
        if self.running.replace(true) {
            return Ok(());
        }
        self.pause_networks(false);
        let vcpus = self.vcpus.borrow();
        vcpus.iter().try_for_each(VcpuHandle::begin_run)?;
        vcpus.iter().try_for_each(VcpuHandle::finish)
    }

    /// Stops all vCPUs where they are; all are told before the first is waited for.
    pub fn pause(&self) -> Result<(), VcpuError> {
        if !self.running.replace(false) {
            return Ok(());
        }
        let vcpus = self.vcpus.borrow();
        vcpus.iter().try_for_each(VcpuHandle::begin_pause)?;
        vcpus.iter().try_for_each(VcpuHandle::finish)?;
        self.pause_networks(true);
        Ok(())
    }

    /// Makes virtual CPUs until there are `count`. A further one waits in KVM, and costs nothing,
    /// until the guest starts it; so does one that the guest has taken off line.
    pub fn ensure_vcpus(&self, count: u8) -> Result<(), BuildError> {
        if count > self.max_vcpus {
            return Err(BuildError::TooManyVcpus { wanted: count, most: self.max_vcpus });
        }
        let mut vcpus = self.vcpus.borrow_mut();
        let first = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        for number in first..count {
            let fd = create_vcpu(&self.vm, number, self.max_vcpus, self.entry)?;
            let vcpu = VcpuHandle::start(fd, number, self.shared.clone())?;
            if self.running.get() {
                vcpu.begin_run()?;
                vcpu.finish()?;
            }
            vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Asks the guest to have `mib` of memory in all.
    pub fn resize_memory(&self, mib: u64) -> Result<MemorySize, BuildError> {
        match &self.memory {
            Some(memory) => Ok(memory.resize(mib, &self.plug)?),
            None if mib <= self.memory_mib => Ok(self.memory_size()),
            None => Err(BuildError::FixedMemory(self.memory_mib)),
        }
    }

    /// Has the request `id` answered once the guest has the memory it is to have; `Some` at once if
    /// its memory never changes.
    pub fn await_memory(&self, id: u64) -> Option<MemorySize> {
        match &self.memory {
            Some(memory) => memory.wait(id),
            None => Some(self.memory_size()),
        }
    }

    fn memory_size(&self) -> MemorySize {
        let mib = self.memory_mib;
        let fixed = MemorySize { requested_mib: mib, present_mib: mib, added: false };
        self.memory.as_ref().map_or(fixed, Growth::size)
    }

    /// A machine that stands still receives and sends nothing.
    fn pause_networks(&self, paused: bool) {
        if let Err(error) = self.networks.set_paused(paused) {
            warn!(self.logger, "machine: network"; "error" => chain(error), "paused" => paused);
        }
    }

    /// Plugs a network device in.
    pub fn add_network(&self, parts: NetworkParts) -> Result<(), NetworkError> {
        self.networks.add(parts, &self.plug, !self.running.get(), &self.logger)
    }

    /// Takes a network device out.
    pub fn remove_network(&self, id: &str) -> Result<(), NetworkError> {
        self.networks.remove(id, &self.plug, &self.logger)
    }

    /// Brings a network device's link up or down.
    pub fn set_link(&self, id: &str, up: bool) -> Result<(), NetworkError> {
        self.networks.set_link(id, up)
    }

    /// Takes devices that have come into the event loop, and those that have gone out of it;
    /// between two turns of it.
    pub fn settle(&self, events: &mut EventLoop) {
        self.plug.settle(events);
    }

    /// The device behind the guest's sockets.
    pub fn vsock(&self) -> MutexGuard<'_, Vsock> {
        locked(&self.vsock)
    }

    /// Counters since boot.
    pub fn metrics(&self) -> Metrics {
        let streams = self.vsock().counters();
        Metrics {
            exits: self.shared.exits.load(Ordering::Relaxed),
            vsock_streams: streams.streams,
            vsock_from_guest: streams.from_guest,
            vsock_to_guest: streams.to_guest,
            fuse_requests: self.fs.as_ref().map_or(0, |fs| locked(fs).requests()),
            vcpus: self.vcpus.borrow().len() as u64,
            memory_mib: self.memory_size().present_mib,
            network: self.networks.metrics(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.borrow_mut().clear();
        if let Some(serial) = &self.serial {
            // A log that cannot be written is no reason to stay.
            let _ = locked(serial).flush();
        }
    }
}

/// A panic aborts the process in what we ship, so a poisoned lock is only seen in tests.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
