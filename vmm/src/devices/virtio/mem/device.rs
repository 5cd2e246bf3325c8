//! The device.

use std::io;

use slog::{Logger, debug, error, info};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::blocks::{Blocks, Counters};
use super::request::{ANSWER_SIZE, Answer, REQUEST_SIZE, Request};
use super::state::{MemState, STATE_VERSION};
use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::events::QueueEvents;
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::{QueuePosition, RestoreError, check_version};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};
use crate::vm::{BlockBacking, BlockRange};

/// virtio 1.2, section 5.
const VIRTIO_ID_MEM: u32 = 24;
/// What is not plugged cannot be read either.
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
const QUEUE_SIZES: [u16; 1] = [16];
/// Requests answered before other devices have their turn: each may change KVM's slots.
const ROUND: usize = 4;
/// How long a buffer may be before it is taken for an attack.
const LIMITS: Limits = Limits { readable: 4096, writable: 4096 };

/// Who is told when the guest has as much memory as it is to have.
pub trait Watcher: Send {
    /// The request that waited for it, and the bytes plugged; or why it waits no longer.
    fn reached(&mut self, request: u64, result: Result<u64, &'static str>);
}

/// The memory device.
pub struct Mem {
    logger: Logger,
    log_limit: LogLimit,
    pub(super) events: QueueEvents,
    ring: Option<Ring>,
    chain: Chain,
    blocks: Blocks,
    watcher: Box<dyn Watcher>,
    waiting: Option<u64>,
}

impl Mem {
    /// A device for the blocks of `range`, none of which is plugged.
    pub fn new(
        range: BlockRange,
        backing: Box<dyn BlockBacking>,
        watcher: Box<dyn Watcher>,
        logger: Logger,
    ) -> io::Result<Self> {
        Ok(Self {
            logger,
            log_limit: LogLimit::default(),
            events: QueueEvents::new()?,
            ring: None,
            chain: Chain::default(),
            blocks: Blocks::new(range, backing),
            watcher,
            waiting: None,
        })
    }

    /// Says how many bytes the guest is to have from now on: rounded up to whole blocks, at most all.
    /// The transport is to tell the driver that its configuration has changed.
    pub fn request(&mut self, bytes: u64) {
        self.blocks.request(bytes);
        self.settle();
    }

    /// Bytes that are to be plugged.
    pub fn requested(&self) -> u64 {
        self.blocks.requested()
    }

    /// Bytes that are plugged.
    pub fn present(&self) -> u64 {
        self.blocks.present()
    }

    /// Counters since the machine was built.
    pub fn counters(&self) -> Counters {
        self.blocks.counters()
    }

    /// Tells the watcher of `request` once the guest has what it is to have. Only the last one waits.
    pub fn wait(&mut self, request: u64) {
        if let Some(before) = self.waiting.replace(request) {
            self.watcher.reached(before, Err("another request waits for the memory now"));
        }
        self.settle();
    }

    /// The device's own state.
    pub fn save(&self) -> MemState {
        let BlockRange { base, block, count } = self.blocks.range();
        MemState {
            version: STATE_VERSION,
            base,
            block,
            count,
            requested: self.blocks.requested(),
            plugged: self.blocks.plugged(),
        }
    }

    /// Takes a saved state into a fresh device of the same range, before the transport restores its
    /// own: the blocks are there from then on, to be filled.
    pub fn restore(&mut self, state: &MemState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)?;
        let range = BlockRange { base: state.base, block: state.block, count: state.count };
        if range != self.blocks.range() {
            return Err(RestoreError::Mismatch("range of memory"));
        }
        self.blocks.request(state.requested);
        for &index in &state.plugged {
            self.blocks.restore(index)?;
        }
        // Whole blocks, in their order.
        if self.save() == *state {
            Ok(())
        } else {
            Err(RestoreError::Mismatch("blocks out of order, or a part of one"))
        }
    }

    /// Answers requests, at most [`ROUND`].
    pub(super) fn serve(&mut self) {
        let mut left = ROUND;
        while let Some(ring) = &mut self.ring {
            if left == 0 {
                self.events.again();
                break;
            }
            left -= 1;
            match ring.pop(&mut self.chain, LIMITS) {
                None if ring.ask_for_kicks() => {}
                None => break,
                Some(Ok(())) => {
                    let (head, answer) = (self.chain.head(), self.answer());
                    let written = self.chain.writable.copy_in(&answer.bytes());
                    if let Some(ring) = &mut self.ring {
                        ring.give_back(head, written);
                    }
                }
                Some(Err(error)) => {
                    if let Some(suppressed) = self.log_limit.allow() {
                        debug!(self.logger, "mem: bad request"; "error" => %error,
                            "suppressed" => suppressed);
                    }
                }
            }
        }
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.tell_guest()
        {
            error!(self.logger, "mem: cannot interrupt the guest"; "error" => %error);
        }
        self.settle();
    }

    /// Does what the chain's request asks for. It is copied out first: what the guest changes in it
    /// afterwards counts no more.
    fn answer(&mut self) -> Answer {
        let mut bytes = [0; REQUEST_SIZE];
        let whole = self.chain.readable.copy_out(&mut bytes) == REQUEST_SIZE;
        let request = Request::parse(&bytes).filter(|_| whole);
        if self.chain.writable.len() < ANSWER_SIZE {
            // Nothing is done that could not be answered.
            return self.blocks.refuse(Answer::Error);
        }
        let result = match request {
            Some(Request::Plug { address, count }) => self.blocks.plug(address, count),
            Some(Request::Unplug { address, count }) => self.blocks.unplug(address, count),
            Some(Request::UnplugAll) => self.blocks.unplug_all(),
            Some(Request::State { address, count }) => Ok(self.blocks.state(address, count)),
            None => Ok(self.blocks.refuse(Answer::Error)),
        };
        match result {
            Ok(answer) => {
                if !matches!(answer, Answer::Done | Answer::State(_))
                    && let Some(suppressed) = self.log_limit.allow()
                {
                    debug!(self.logger, "mem: refused"; "request" => ?request,
                        "answer" => ?answer, "suppressed" => suppressed);
                }
                answer
            }
            Err(error) => {
                if let Some(suppressed) = self.log_limit.allow() {
                    error!(self.logger, "mem: the host cannot"; "request" => ?request,
                        "error" => %error, "suppressed" => suppressed);
                }
                Answer::Busy
            }
        }
    }

    /// Tells whoever waits if there is nothing more to wait for.
    fn settle(&mut self) {
        if self.blocks.present() == self.blocks.requested()
            && let Some(request) = self.waiting.take()
        {
            let present = self.blocks.present();
            info!(self.logger, "mem: the guest has what it is to have"; "mib" => present >> 20);
            self.watcher.reached(request, Ok(present));
        }
    }

    pub(super) fn logger(&self) -> &Logger {
        &self.logger
    }

    /// The configuration's fields (section 5.15.4), in order.
    fn config(&self) -> [u64; 7] {
        let range = self.blocks.range();
        // Without node (the second), which no feature offers; all of the region is usable.
        let (present, requested) = (self.blocks.present(), self.blocks.requested());
        [range.block, 0, range.base, range.size(), range.size(), present, requested]
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config().into_iter().flat_map(u64::to_le_bytes);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(config.skip(start)) {
            *byte = value;
        }
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
    use std::sync::{Arc, Mutex};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::blocks::tests::{Notes, RANGE};
    use super::*;
    use crate::devices::virtio::testing::{DriverQueue, logger};
    use crate::vm::GuestMemory;

    type Told = Arc<Mutex<Vec<(u64, Result<u64, &'static str>)>>>;

    struct Ear(Told);

    impl Watcher for Ear {
        fn reached(&mut self, request: u64, result: Result<u64, &'static str>) {
            self.0.lock().unwrap().push((request, result));
        }
    }

    struct Bench {
        memory: Arc<GuestMemory>,
        queue: DriverQueue,
        mem: Mem,
        told: Told,
    }

    fn fresh(told: &Told) -> Mem {
        let ear = Box::new(Ear(Arc::clone(told)));
        Mem::new(RANGE, Box::new(Notes::default()), ear, logger()).unwrap()
    }

    impl Bench {
        fn new() -> Self {
            let ranges = [(GuestAddress(0), 0x10_0000)];
            let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
            let queue = DriverQueue::new(&memory, 0, 16);
            let told = Told::default();
            let mut mem = fresh(&told);
            let queues = vec![queue.activate()];
            let memory_now = (*memory).clone().into();
            mem.activate(Activation { memory: memory_now, features: 0, queues }).unwrap();
            Self { memory, queue, mem, told }
        }

        fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u8, u8) {
            let mut bytes = [0; 24];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&address.to_le_bytes());
            bytes[16..18].copy_from_slice(&count.to_le_bytes());
            self.memory.write_slice(&bytes, GuestAddress(0x8000)).unwrap();
            self.memory.write_slice(&[0xee; 16], GuestAddress(0x9000)).unwrap();
            self.queue.offer(&[(0x8000, 24)], &[(0x9000, 10)]);
            self.mem.serve();
            assert_eq!(self.queue.take().unwrap().1, 10);
            let mut answer = [0; 11];
            self.memory.read_slice(&mut answer, GuestAddress(0x9000)).unwrap();
            assert_eq!(answer[10], 0xee, "no further");
            (answer[0], answer[8])
        }

        fn config(&self, offset: u64) -> u64 {
            let mut bytes = [0; 8];
            self.mem.config_read(offset, &mut bytes);
            u64::from_le_bytes(bytes)
        }
    }

    #[test]
    fn a_guest_plugs_what_it_is_to_have_and_gives_it_back() {
        let mut bench = Bench::new();
        let fields: Vec<u64> = (0..8).map(|field| bench.config(8 * field)).collect();
        assert_eq!(fields, [128 << 20, 0, 4 << 30, 1 << 30, 1 << 30, 0, 0, 0]);
        assert_eq!(bench.config(u64::MAX), 0);
        bench.mem.request(200 << 20);
        assert_eq!(bench.config(48), 256 << 20, "whole blocks");
        bench.mem.wait(7);
        assert_eq!(bench.ask(0, RANGE.base, 1), (0, 0));
        assert_eq!(bench.ask(3, RANGE.base, 2), (0, 2), "mixed");
        assert!(bench.told.lock().unwrap().is_empty());
        assert_eq!(bench.ask(0, RANGE.address(1), 1), (0, 0));
        assert_eq!(bench.config(40), 256 << 20);
        assert_eq!(*bench.told.lock().unwrap(), [(7, Ok(256 << 20))]);
        assert_eq!(bench.ask(0, RANGE.address(2), 1), (1, 0), "no more");
        bench.mem.request(0);
        bench.mem.wait(8);
        bench.mem.wait(9);
        assert_eq!(bench.ask(2, 0, 0), (0, 0));
        let told = bench.told.lock().unwrap();
        assert!(matches!(told[1..], [(8, Err(_)), (9, Ok(0))]), "{told:?}");
    }

    #[test]
    fn nonsense_is_answered_and_changes_nothing() {
        let mut bench = Bench::new();
        bench.mem.request(1 << 30);
        assert_eq!(bench.ask(0, RANGE.base + 1, 1), (3, 0));
        assert_eq!(bench.ask(9, RANGE.base, 1), (3, 0));
        // Cut short, without room for an answer, without anything.
        bench.queue.offer(&[(0x8000, 10)], &[(0x9000, 10)]);
        bench.queue.offer(&[(0x8000, 24)], &[(0x9000, 9)]);
        bench.queue.offer(&[(0x8000, 24)], &[]);
        bench.queue.offer(&[], &[(0x9000, 10)]);
        bench.queue.offer(&[(0xffff_ffff_0000, 24)], &[(0x9000, 10)]);
        bench.mem.serve();
        bench.mem.serve();
        let lengths: Vec<u32> = std::iter::from_fn(|| Some(bench.queue.take()?.1)).collect();
        assert_eq!(lengths, [10, 9, 0, 10, 0]);
        assert_eq!((bench.mem.present(), bench.mem.counters().refused), (0, 6));
    }

    #[test]
    fn blocks_outlive_a_reset_of_the_driver() {
        let mut bench = Bench::new();
        bench.mem.request(1 << 30);
        bench.ask(0, RANGE.base, 3);
        bench.mem.reset();
        assert!(bench.mem.positions().is_empty());
        assert_eq!(bench.config(40), 3 * RANGE.block);
    }

    #[test]
    fn state_survives_a_round_trip() {
        let mut bench = Bench::new();
        bench.mem.request(1 << 30);
        bench.ask(0, RANGE.address(1), 2);
        bench.ask(0, RANGE.address(6), 1);
        let text = serde_json::to_string(&bench.mem.save()).unwrap();
        let mut state: MemState = serde_json::from_str(&text).unwrap();
        let mut other = fresh(&bench.told);
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(other.present(), 3 * RANGE.block);
        state.plugged = vec![1, 1];
        assert!(matches!(fresh(&bench.told).restore(&state), Err(RestoreError::Io(_))));
        for (requested, plugged) in [(state.requested, vec![2, 1]), (state.requested - 1, vec![])] {
            let odd = MemState { requested, plugged, ..state.clone() };
            assert!(matches!(fresh(&bench.told).restore(&odd), Err(RestoreError::Mismatch(_))));
        }
        state.plugged = vec![8];
        assert!(fresh(&bench.told).restore(&state).is_err());
        state.count = 9;
        let mismatch = fresh(&bench.told).restore(&state);
        assert!(matches!(mismatch, Err(RestoreError::Mismatch(_))));
        state.version = 2;
        let version = fresh(&bench.told).restore(&state);
        assert!(matches!(version, Err(RestoreError::Version { found: 2, known: 1 })));
    }
}
