//! A machine that has been built.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_control::Metrics;

use crate::devices::legacy::Serial;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::vsock::Vsock;
use crate::vcpu::{Shared, VcpuError, VcpuHandle};
use crate::vm::Vm;

/// A machine whose vCPUs have threads; they wait until [`Machine::resume`].
pub struct Machine {
    // Dropped first: their threads end before what they use goes.
    pub(super) vcpus: Vec<VcpuHandle>,
    pub(super) running: Cell<bool>,
    pub(super) shared: Arc<Shared>,
    pub(super) serial: Option<Arc<Mutex<Serial>>>,
    pub(super) vsock: Arc<Mutex<Vsock>>,
    pub(super) fs: Option<Arc<Mutex<Fs>>>,
    /// Keeps the guest's memory mapped.
    pub(super) _vm: Vm,
}

impl Machine {
    /// Lets all vCPUs run.
    pub fn resume(&self) -> Result<(), VcpuError> {
        if self.running.replace(true) {
            return Ok(());
        }
        self.vcpus.iter().try_for_each(VcpuHandle::begin_run)?;
        self.vcpus.iter().try_for_each(VcpuHandle::finish)
    }

    /// Stops all vCPUs where they are; all are told before the first is waited for.
    pub fn pause(&self) -> Result<(), VcpuError> {
        if !self.running.replace(false) {
            return Ok(());
        }
        self.vcpus.iter().try_for_each(VcpuHandle::begin_pause)?;
        self.vcpus.iter().try_for_each(VcpuHandle::finish)
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
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.clear();
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
