//! Virtio devices and their one transport, PCI.
//!
//! A device is made of two halves under one lock. [`VirtioDevice`] is what the transport
//! ([`transport::pci::VirtioPci`]) calls from vCPU threads; `event_manager::MutEventSubscriber` is
//! what the machine's event loop calls. Both take the same `Arc<Mutex<Device>>`:
//!
//! ```text
//! let rng = Arc::new(Mutex::new(rng::Rng::new(logger)?));
//! let function = VirtioPci::new(rng.clone(), memory, wiring, bar_address, logger)?; // onto the bus
//! event_manager.add_subscriber(rng);                                        // into the event loop
//! ```
//!
//! A vCPU thread cannot touch the event loop's interest list, so activation and reset only raise an
//! eventfd ([`events::QueueEvents`]) on which the event loop then takes queues in or lets them go.
//!
//! System calls, for the filters. Making devices and their transports: `eventfd2`, `setsockopt`
//! (`SOL_SOCKET`, `SO_SNDBUF`). vCPU threads, in activation and reset: `fcntl` (`F_DUPFD_CLOEXEC`),
//! `eventfd2`, `write` (eventfds), `close`, `shutdown`, and KVM's interrupt routing. The event loop:
//! `epoll_ctl`, `epoll_wait`, `write` (eventfds, interrupts), `getrandom`, `socketpair`
//! (`AF_UNIX`), `setsockopt` as above, `sendmsg`, `recvmsg`, `shutdown`, `close`; no read of a kick.
//!
//! Whatever comes out of guest memory goes through [`chain::Chain`], which is where addresses and
//! lengths of the guest are checked.

pub mod chain;
pub mod events;
pub mod fs;
pub mod log_limit;
pub mod mem;
pub mod net;
pub mod ring;
pub mod rng;
mod socket;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
pub mod vsock;

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::ring::Ring;
use crate::vm::{LiveMemory, MsiVector};

/// A queue as the guest configured it, checked and frozen at DRIVER_OK.
pub struct ActiveQueue {
    /// The queue; its addresses lie in guest memory.
    pub queue: Queue,
    /// Signalled when the guest has made buffers available.
    pub kick: EventFd,
    /// Raised when buffers have been used.
    pub interrupt: Arc<dyn MsiVector>,
}

/// What a device gets when the guest's driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: LiveMemory,
    /// The features both sides agreed on.
    pub features: u64,
    /// The queues, in the device's order.
    pub queues: Vec<ActiveQueue>,
}

impl Activation {
    /// Each queue as a ring, and the descriptor that is kicked for it, if there are as many as the device
    /// needs.
    pub fn rings<const N: usize>(self) -> Result<[(Ring, EventFd); N], ActivateError> {
        let got = self.queues.len();
        let Ok(queues) = <[ActiveQueue; N]>::try_from(self.queues) else {
            return Err(ActivateError::Queues { got, wanted: N });
        };
        let memory = Arc::new(self.memory);
        let ring = |ActiveQueue { queue, kick, interrupt }| {
            (Ring::new(queue, interrupt, Arc::clone(&memory)), kick)
        };
        Ok(queues.map(ring))
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The guest set up fewer queues than the device needs.
    #[error("the guest set up {got} queues of {wanted}")]
    Queues {
        /// How many are ready.
        got: usize,
        /// How many the device needs.
        wanted: usize,
    },
    /// A descriptor the device works with failed.
    #[error("device descriptor")]
    Io(#[from] std::io::Error),
}

/// A device behind the transport.
///
/// The transport calls it under its lock from vCPU threads; its event handler (a subscriber of the
/// machine's event loop) runs under the same lock.
pub trait VirtioDevice: Send {
    /// The device's type number (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue, in order.
    fn queue_sizes(&self) -> &[u16];
    /// How many of the queues, from the first on, a driver with these features has to set up.
    fn queues_needed(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }
    /// The features offered, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;
    /// Reads device configuration; beyond its end reads as zero.
    fn config_read(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration; most devices have nothing to write.
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: called once between resets.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// The driver reset the device: drop the queues, forget all guest state.
    fn reset(&mut self);
    /// How far the device has come in each queue, for saving; empty while it is not active.
    fn positions(&self) -> Vec<state::QueuePosition>;
}
