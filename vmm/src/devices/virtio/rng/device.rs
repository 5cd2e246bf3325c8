//! The device.

use std::io;

use serde::{Deserialize, Serialize};
use slog::{Logger, debug, error};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::events::QueueEvents;
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::{QueuePosition, RestoreError, check_version};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;
/// A longer buffer is legal but gets no more than this.
const REQUEST_BYTES: usize = 4096;
/// Requests answered before other devices have their turn.
const ROUND: usize = 16;
/// How long a buffer may be before it is taken for an attack.
const LIMITS: Limits = Limits { readable: 0, writable: 1 << 20 };

/// The entropy device.
pub struct Rng {
    logger: Logger,
    log_limit: LogLimit,
    pub(super) events: QueueEvents,
    ring: Option<Ring>,
    chain: Chain,
}

/// A saved [`Rng`]. It holds nothing but its version: entropy must never come out of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    version: u16,
}

impl Rng {
    /// A device that waits for its driver.
    pub fn new(logger: Logger) -> io::Result<Self> {
        Ok(Self {
            logger,
            log_limit: LogLimit::default(),
            events: QueueEvents::new()?,
            ring: None,
            chain: Chain::default(),
        })
    }

    /// The device's own state.
    pub fn save(&self) -> RngState {
        RngState { version: STATE_VERSION }
    }

    /// Takes a saved state, before the transport restores its own.
    pub fn restore(&mut self, state: &RngState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)
    }

    /// Answers requests, at most [`ROUND`].
    pub(super) fn serve(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let mut left = ROUND;
        loop {
            if left == 0 {
                self.events.again();
                break;
            }
            left -= 1;
            match ring.pop(&mut self.chain, LIMITS) {
                None if ring.ask_for_kicks() => {}
                None => break,
                Some(Ok(())) => match fill(&mut self.chain) {
                    Ok(len) => ring.give_back(self.chain.head(), len),
                    Err(error) => {
                        error!(self.logger, "rng: no entropy"; "error" => %error);
                        ring.give_back(self.chain.head(), 0);
                    }
                },
                Some(Err(error)) => {
                    if let Some(suppressed) = self.log_limit.allow() {
                        debug!(self.logger, "rng: bad request"; "error" => %error, "suppressed" => suppressed);
                    }
                }
            }
        }
        if let Err(error) = ring.tell_guest() {
            error!(self.logger, "rng: cannot interrupt the guest"; "error" => %error);
        }
    }

    pub(super) fn logger(&self) -> &Logger {
        &self.logger
    }
}

/// Fills the chain's buffer up to the limit; returns how many bytes it got.
fn fill(chain: &mut Chain) -> io::Result<usize> {
    chain.writable.truncate(REQUEST_BYTES);
    let total = chain.writable.len();
    let mut block = [0_u8; 256];
    while !chain.writable.is_empty() {
        let count = block.len().min(chain.writable.len());
        // SAFETY: the buffer is ours and as long as said. Up to 256 bytes come at once or not at
        // all (getrandom(2)).
        let got = unsafe { libc::getrandom(block.as_mut_ptr().cast(), count, 0) };
        if usize::try_from(got) != Ok(count) {
            return Err(io::Error::last_os_error());
        }
        chain.writable.copy_in(&block[..count]);
        chain.writable.advance(count);
    }
    Ok(total)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [(ring, kick)] = activation.rings()?;
        self.ring = Some(ring);
        self.events.arm([kick])?;
        Ok(())
    }

    fn reset(&mut self) {
        self.ring = None;
        self.events.disarm();
    }

    fn positions(&self) -> Vec<QueuePosition> {
        self.ring.iter().map(Ring::position).collect()
    }
}

#[cfg(test)]
mod tests {
    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use std::sync::{Arc, Mutex};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::testing::{DriverQueue, logger};
    use crate::vm::GuestMemory;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap())
    }

    #[test]
    fn fills_buffers_when_kicked_through_the_event_loop() {
        let memory = memory();
        let rng = Arc::new(Mutex::new(Rng::new(logger()).unwrap()));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().unwrap();
        manager.add_subscriber(rng.clone());
        for _ in 0..2 {
            let mut queue = DriverQueue::new(&memory, 0, 64);
            memory.write_slice(&[0; 0x1_0000], GuestAddress(0)).unwrap();
            let active = queue.activate();
            let kick = active.kick.try_clone().unwrap();
            let activation =
                Activation { memory: (*memory).clone().into(), features: 0, queues: vec![active] };
            rng.lock().unwrap().activate(activation).unwrap();
            manager.run_with_timeout(1000).unwrap();
            let head = queue.offer(&[], &[(0x8000, 64), (0x9000, 10000)]);
            kick.write(1).unwrap();
            manager.run_with_timeout(1000).unwrap();
            assert_eq!(queue.take(), Some((head, 4096)));
            assert_eq!(queue.interrupt.take(), 1);
            let mut bytes = [0; 64];
            memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
            assert_ne!(bytes, [0; 64]);
            let past: u8 = memory.read_obj(GuestAddress(0x9000 + 4096 - 64)).unwrap();
            assert_eq!(past, 0, "not past the limit");
            rng.lock().unwrap().reset();
            assert!(rng.lock().unwrap().positions().is_empty());
            manager.run_with_timeout(1000).unwrap();
        }
    }

    #[test]
    fn a_flood_is_served_in_rounds_and_bad_chains_are_given_back() {
        let memory = memory();
        let mut queue = DriverQueue::new(&memory, 0, 64);
        let mut rng = Rng::new(logger()).unwrap();
        let activation = Activation {
            memory: (*memory).clone().into(),
            features: 0,
            queues: vec![queue.activate()],
        };
        rng.activate(activation).unwrap();
        for _ in 0..40 {
            queue.offer(&[], &[(0x8000, 8)]);
        }
        queue.offer(&[(0x8000, 8)], &[]);
        queue.offer(&[], &[(0xffff_ffff_0000, 8)]);
        rng.serve();
        assert_eq!(std::iter::from_fn(|| queue.take()).count(), ROUND);
        rng.serve();
        rng.serve();
        let rest: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(rest.len(), 42 - ROUND);
        assert_eq!(rest[rest.len() - 2].1, 0);
        assert_eq!(rest[rest.len() - 1].1, 0);
        assert_eq!(rng.positions(), [QueuePosition { next_avail: 42, next_used: 42 }]);
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let mut rng = Rng::new(logger()).unwrap();
        let mut state = rng.save();
        rng.restore(&state).unwrap();
        state.version = 2;
        assert!(matches!(rng.restore(&state), Err(RestoreError::Version { found: 2, known: 1 })));
    }
}
