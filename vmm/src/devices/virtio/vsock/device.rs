//! The device.

use std::io;
use std::os::fd::OwnedFd;

use event_manager::EventOps;
use husk_control::GUEST_CID;
use slog::{Logger, debug, error};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::incoming::Round;
use super::mux::{Counters, Listener, Mux};
use super::outgoing::Buffers;
use super::state::{STATE_VERSION, VsockState};
use super::{ConnectError, StreamSink};
use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::events::QueueEvents;
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::{QueuePosition, RestoreError, check_version};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};

/// Receive, transmit, events. The driver keeps 4 KiB of memory per receive entry.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();
const EVENT_LIMITS: Limits = Limits { readable: 0, writable: 4096 };

struct Rings {
    rx: Ring,
    tx: Ring,
    event: Ring,
}

/// The socket device.
pub struct Vsock {
    logger: Logger,
    log_limit: LogLimit,
    pub(super) events: QueueEvents,
    pub(super) mux: Mux,
    rings: Option<Rings>,
    chain: Chain,
    buffers: Buffers,
    /// The guest must learn that its connections are gone.
    announce_reset: bool,
    /// The guest has reset the device, and the event loop has not followed up yet.
    sweep_due: bool,
    /// Requests of the host's that a reset has ended; the event loop tells the sink.
    ended_requests: Vec<u64>,
}

impl Vsock {
    /// A device that waits for its driver; streams go to `sink`.
    pub fn new(sink: Box<dyn StreamSink>, logger: Logger) -> io::Result<Self> {
        Ok(Self {
            logger,
            log_limit: LogLimit::default(),
            events: QueueEvents::new()?,
            mux: Mux::new(sink),
            rings: None,
            chain: Chain::default(),
            buffers: Buffers::default(),
            announce_reset: false,
            sweep_due: false,
            ended_requests: Vec::new(),
        })
    }

    /// Lets the guest connect to a host port: once, or until [`Vsock::unlisten`].
    pub fn listen(&mut self, port: u32, once: bool) {
        self.mux.listeners.insert(port, if once { Listener::Once } else { Listener::Every });
    }

    /// Lets the guest connect to a host port once, which joins it to `stream`.
    pub fn accept(&mut self, port: u32, stream: OwnedFd) {
        self.mux.listeners.insert(port, Listener::Over(stream));
    }

    /// Closes a host port; connections stay.
    pub fn unlisten(&mut self, port: u32) {
        self.mux.listeners.remove(&port);
    }

    /// Asks for a connection to a port of the guest's. Unless it fails at once, the sink is told
    /// later what came of `request`.
    pub fn connect(&mut self, port: u32, request: u64) -> Result<(), ConnectError> {
        if self.rings.is_none() {
            return Err(ConnectError::NotReady);
        }
        self.mux.connect(port, request)?;
        self.events.again();
        Ok(())
    }

    /// Numbers for metrics.
    pub fn counters(&self) -> Counters {
        self.mux.counters()
    }

    /// Bytes of the guest's that host ends have not taken yet. A machine that ends should let the
    /// event loop run until there are none, or its patience ends.
    pub fn unsent(&self) -> usize {
        self.mux.unsent()
    }

    /// The device's own state.
    pub fn save(&self) -> VsockState {
        VsockState { version: STATE_VERSION, guest_cid: GUEST_CID }
    }

    /// Takes a saved state, before the transport restores its own.
    pub fn restore(&mut self, state: &VsockState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)?;
        if state.guest_cid != GUEST_CID {
            return Err(RestoreError::Mismatch("context id"));
        }
        self.announce_reset = true;
        Ok(())
    }

    /// Does what there is to do in the queues, within bounds.
    pub(super) fn serve(&mut self, ops: &mut EventOps<'_>) {
        let Some(rings) = &mut self.rings else { return };
        let (logger, log_limit) = (&self.logger, &mut self.log_limit);
        if self.announce_reset {
            self.announce_reset = !announce(&mut rings.event, &mut self.chain);
            report(logger, rings.event.tell_guest());
        }
        let taken = self.mux.take_packets(&mut rings.tx, &mut self.chain, ops, |fault| {
            if let Some(suppressed) = log_limit.allow() {
                debug!(logger, "vsock: packet dropped"; "why" => fault, "suppressed" => suppressed);
            }
        });
        report(logger, rings.tx.tell_guest());
        let more = self.mux.send_packets(&mut rings.rx, &mut self.buffers, ops, logger);
        let stalled = taken == Round::Stalled && self.mux.has_room_for_resets();
        if more || stalled || taken == Round::More {
            self.events.again();
        }
    }

    /// Follows up on a reset by the guest.
    pub(super) fn sweep(&mut self, ops: &mut EventOps<'_>) {
        if !std::mem::take(&mut self.sweep_due) {
            return;
        }
        for request in self.ended_requests.drain(..) {
            self.mux.sink.connected(request, Err(ConnectError::Reset));
        }
        self.mux.sweep(ops);
    }

    pub(super) fn logger(&self) -> &Logger {
        &self.logger
    }
}

/// Tells the guest that its connections are gone; `false` if it has no buffer for that yet.
fn announce(ring: &mut Ring, chain: &mut Chain) -> bool {
    loop {
        match ring.pop(chain, EVENT_LIMITS) {
            None if ring.ask_for_kicks() => {}
            None => return false,
            Some(Err(_)) => {}
            Some(Ok(())) => {
                let len = chain.writable.copy_in(&TRANSPORT_RESET);
                ring.give_back(chain.head(), len);
                return true;
            }
        }
    }
}

fn report(logger: &Logger, result: io::Result<()>) {
    if let Err(error) = result {
        error!(logger, "vsock: cannot interrupt the guest"; "error" => %error);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = GUEST_CID.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [(rx, rx_kick), (tx, tx_kick), (event, event_kick)] = activation.rings()?;
        self.rings = Some(Rings { rx, tx, event });
        self.events.arm([rx_kick, tx_kick, event_kick])?;
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = None;
        let ended = self.mux.leave_all();
        self.ended_requests.extend(ended);
        self.sweep_due = true;
        self.events.disarm();
    }

    fn positions(&self) -> Vec<QueuePosition> {
        let rings = self.rings.iter();
        rings.flat_map(|r| [r.rx.position(), r.tx.position(), r.event.position()]).collect()
    }
}
