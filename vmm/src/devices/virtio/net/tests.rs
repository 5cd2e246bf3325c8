//! The device between a driver, good or hostile, and a tap or a socket that stands in for one.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_control::{RateLimit, TokenBucket};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Net, NetConfig, NetError};
use super::tap::Tap;
use super::{Counters, Direction, NetState};
use crate::devices::virtio::state::RestoreError;
use crate::devices::virtio::testing::{DriverQueue, logger};
use crate::devices::virtio::{Activation, VirtioDevice};
use crate::vm::GuestMemory;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SENT: u64 = 0x10_0000;
const BUFFERS: u64 = 0x20_0000;
const VERSION_1: u64 = 1 << 32;
const MERGEABLE: u64 = 1 << 15;
const CONTROL: u64 = 1 << 17;
const ALL: u64 = u64::MAX;

fn config() -> NetConfig {
    NetConfig {
        taps: Vec::new(),
        vhost: Vec::new(),
        mac: MAC,
        mtu: Some(1400),
        receive_limit: None,
        send_limit: None,
    }
}

/// A frame behind a header of zeroes.
fn frame(len: usize) -> Vec<u8> {
    let body = (0..len).map(|at| u8::try_from(at % 251).unwrap());
    [0; 12].into_iter().chain(body).collect()
}

struct Guest {
    memory: Arc<GuestMemory>,
    net: Arc<Mutex<Net>>,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    wires: Vec<UnixDatagram>,
    features: u64,
    queues: Vec<DriverQueue>,
    kicks: Vec<EventFd>,
}

impl Guest {
    fn new(features: u64) -> Self {
        Self::with(1, features, config())
    }

    fn with(pairs: usize, features: u64, config: NetConfig) -> Self {
        let (taps, wires) = (0..pairs)
            .map(|_| {
                let (ours, theirs) = UnixDatagram::pair().unwrap();
                theirs.set_nonblocking(true).unwrap();
                (Tap::stand_in(ours.into()).unwrap(), theirs)
            })
            .unzip();
        Self::over(taps, wires, features, config)
    }

    fn over(taps: Vec<Tap>, wires: Vec<UnixDatagram>, features: u64, config: NetConfig) -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap());
        let net = Arc::new(Mutex::new(Net::over(taps, config, logger()).unwrap()));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().unwrap();
        manager.add_subscriber(net.clone());
        let features = features & net.lock().unwrap().features() | VERSION_1;
        let (queues, kicks) = (Vec::new(), Vec::new());
        let mut guest = Self { memory, net, manager, wires, features, queues, kicks };
        guest.activate();
        guest
    }

    fn net(&self) -> MutexGuard<'_, Net> {
        self.net.lock().unwrap()
    }

    fn activate(&mut self) {
        self.memory.write_slice(&[0; 0x10_0000], GuestAddress(0)).unwrap();
        let count = self.net().queues_needed(self.features);
        self.queues = (0..count)
            .map(|index| DriverQueue::new(&self.memory, 0x4000 * index as u64, 256))
            .collect();
        let queues: Vec<_> = self.queues.iter().map(DriverQueue::activate).collect();
        self.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let memory = (*self.memory).clone().into();
        let activation = Activation { memory, features: self.features, queues };
        self.net().activate(activation).unwrap();
        self.run();
    }

    fn run(&mut self) {
        let start = Instant::now();
        while self.manager.run_with_timeout(0).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(5), "the event loop does not rest");
        }
    }

    fn kick(&mut self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
        self.run();
    }

    /// Offers buffers for frames, of that length each, and kicks.
    fn give(&mut self, buffers: &[(u64, u32)]) {
        for &buffer in buffers {
            self.queues[0].offer(&[], &[buffer]);
        }
        self.kick(0);
    }

    /// Sends a frame, whose header comes with it, in one piece.
    fn send(&mut self, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(SENT)).unwrap();
        self.queues[1].offer(&[(SENT, u32::try_from(frame.len()).unwrap())], &[]);
        self.kick(1);
    }

    /// What has come out of the wire.
    fn heard(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 0x2_0000];
        let len = self.wires[0].recv(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Gives a command over the control queue; the answer.
    fn command(&mut self, request: &[u8]) -> u8 {
        let (at, answer) = (0xf_0000, 0xf_8000);
        self.memory.write_slice(request, GuestAddress(at)).unwrap();
        self.memory.write_obj(0x55_u8, GuestAddress(answer)).unwrap();
        let control = self.queues.len() - 1;
        let len = u32::try_from(request.len()).unwrap();
        self.queues[control].offer(&[(at, len)], &[(answer, 1)]);
        self.kick(control);
        assert_eq!(self.queues[control].take().unwrap().1, 1);
        self.memory.read_obj(GuestAddress(answer)).unwrap()
    }

    fn counters(&self) -> Counters {
        self.net().counters()
    }
}

#[test]
fn frames_pass_both_ways_and_are_counted() {
    let mut guest = Guest::new(ALL & !MERGEABLE);
    let sent = frame(100);
    guest.send(&sent);
    assert_eq!(guest.heard(), Some(sent));
    assert_eq!(guest.queues[1].take().unwrap().1, 0);
    guest.give(&[(BUFFERS, 1526), (BUFFERS + 0x1000, 1526)]);
    for (index, len) in [(0_u64, 60), (1, 1514)] {
        guest.wires[0].send(&frame(len)).unwrap();
        guest.run();
        let taken = guest.queues[0].take().unwrap();
        assert_eq!(taken.1, u32::try_from(12 + len).unwrap());
        let received = guest.read(BUFFERS + 0x1000 * index, 12 + len);
        assert_eq!(received[10..12], [1, 0], "one buffer");
        assert_eq!(received[12..], frame(len)[12..]);
    }
    assert_eq!(guest.queues[0].interrupt.take(), 2);
    let received = Direction { packets: 2, bytes: 1574, drops: 0 };
    let sent = Direction { packets: 1, bytes: 100, drops: 0 };
    assert_eq!(guest.counters(), Counters { received, sent });
}

#[test]
fn a_frame_may_be_spread_over_buffers() {
    let mut guest = Guest::new(ALL);
    let buffers: Vec<_> = (0..64).map(|index| (BUFFERS + 0x1000 * index, 1526)).collect();
    guest.give(&buffers);
    for (at, len) in [(0, 5000), (4, 40), (5, 60_000)] {
        guest.wires[0].send(&frame(len)).unwrap();
        guest.run();
        assert_eq!(guest.queues[0].interrupt.take(), 1);
        let count = (12 + len).div_ceil(1526);
        let mut bytes = Vec::new();
        for index in at..at + count {
            let (_, filled) = guest.queues[0].take().unwrap();
            let filled = usize::try_from(filled).unwrap();
            bytes.extend(guest.read(BUFFERS + 0x1000 * index as u64, filled));
        }
        assert!(guest.queues[0].take().is_none());
        assert_eq!(usize::from(bytes[10]), count);
        assert_eq!(bytes[12..], frame(len)[12..]);
    }
}

#[test]
fn without_buffers_the_tap_is_left_alone() {
    let mut guest = Guest::new(ALL);
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    assert_eq!(guest.counters().received, Direction::default());
    guest.give(&[(BUFFERS, 1526)]);
    assert_eq!(guest.queues[0].take().unwrap().1, 72);
    // No room for a header: of no use.
    guest.wires[0].send(&frame(60)).unwrap();
    guest.give(&[(BUFFERS, 11), (BUFFERS, 0)]);
    assert_eq!(guest.queues[0].take().unwrap().1, 0);
    assert_eq!(guest.queues[0].take().unwrap().1, 0);
    assert_eq!(guest.counters().received.packets, 1);
}

#[test]
fn a_frame_that_does_not_fit_waits_or_is_dropped() {
    let mut guest = Guest::new(ALL);
    guest.give(&[(BUFFERS, 1000), (BUFFERS + 1000, 1000)]);
    guest.wires[0].send(&frame(4000)).unwrap();
    guest.run();
    assert!(guest.queues[0].take().is_none());
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    guest.give(&[(BUFFERS + 2000, 1000)]);
    assert!(guest.queues[0].take().is_none());
    guest.give(&[(BUFFERS + 3000, 1000), (BUFFERS + 4000, 1000), (BUFFERS + 5000, 1000)]);
    let taken: Vec<_> = (0..6).filter_map(|_| guest.queues[0].take()).map(|used| used.1).collect();
    assert_eq!(taken, [1000, 1000, 1000, 1000, 12, 72]);
    let received = guest.read(BUFFERS, 4012);
    assert_eq!(received[10..12], [5, 0]);
    assert_eq!(received[12..], frame(4000)[12..]);
    assert_eq!(guest.counters().received.drops, 0);

    // Buffers of a whole queue that together do not hold it.
    let buffers: Vec<_> = (0..256).map(|index| (BUFFERS + 16 * index, 16)).collect();
    guest.give(&buffers);
    guest.wires[0].send(&frame(5000)).unwrap();
    guest.wires[0].send(&frame(20)).unwrap();
    guest.run();
    assert_eq!(guest.queues[0].take().unwrap().1, 16);
    assert_eq!(guest.counters().received.drops, 1);

    let mut guest = Guest::new(ALL & !MERGEABLE);
    guest.give(&[(BUFFERS, 1000), (BUFFERS, 1000)]);
    guest.wires[0].send(&frame(4000)).unwrap();
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    assert_eq!(guest.queues[0].take().unwrap().1, 72);
    assert_eq!(guest.counters().received.drops, 1);
}

#[test]
fn malformed_frames_are_dropped_and_good_ones_after_them_pass() {
    let mut guest = Guest::new(ALL);
    let len = |frame: &[u8]| u32::try_from(frame.len()).unwrap();
    let good = frame(60);
    guest.memory.write_slice(&good, GuestAddress(SENT)).unwrap();
    let bad_header = SENT + 0x1000;
    guest.memory.write_slice(&[1, 9, 0xff, 0xff], GuestAddress(bad_header)).unwrap();
    type Pieces<'a> = &'a [(u64, u32)];
    let cases: [(Pieces<'_>, Pieces<'_>, &str); 9] = [
        (&[(SENT, 11)], &[], "shorter than the header"),
        (&[(SENT, 25)], &[], "shorter than an Ethernet header"),
        (&[(SENT, 0)], &[], "nothing"),
        (&[(SENT, len(&good))], &[(BUFFERS, 8)], "something writable"),
        (&[], &[(BUFFERS, 2000)], "only something writable"),
        (&[(0xff_fff0, 0x100)], &[], "past the end of memory"),
        (&[(u64::MAX - 4, 0x100)], &[], "past the end of addresses"),
        (&[(SENT, 0x2_0000)], &[], "too long"),
        (&[(bad_header, 100)], &[], "unknown segmentation"),
    ];
    for (dropped, (readable, writable, what)) in (1..).zip(cases) {
        guest.queues[1].offer(readable, writable);
        guest.kick(1);
        assert_eq!(guest.queues[1].take().map(|used| used.1), Some(0), "{what}");
        assert_eq!(guest.heard(), None, "{what}");
        assert_eq!(guest.counters().sent.drops, dropped, "{what}");
    }
    // In pieces, some of them empty, the header across two of them.
    let pieces = [(SENT, 5), (SENT, 0), (SENT + 5, 30), (SENT + 35, 37), (SENT, 0)];
    guest.queues[1].offer(&pieces, &[]);
    guest.kick(1);
    assert_eq!(guest.heard(), Some(good));
}

#[test]
fn chains_that_do_not_end_and_heads_outside_the_table_are_survived() {
    let mut guest = Guest::new(ALL);
    let table = 0x4000;
    let put = |guest: &mut Guest, flags: u16, next: u16| {
        let head = guest.queues[1].offer(&[(SENT, 100)], &[]);
        let at = table + 16 * u64::from(head);
        guest.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        guest.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        guest.kick(1);
        guest.queues[1].take()
    };
    // To itself, outside the table, an indirect table that is no table.
    for (flags, next) in [(1, 0), (1, 256), (1, u16::MAX), (4, 0)] {
        assert_eq!(put(&mut guest, flags, next).unwrap().1, 0);
    }
    assert_eq!(guest.counters().sent.drops, 4);
    guest.queues[1].publish(256);
    guest.queues[1].publish(u16::MAX);
    guest.kick(1);
    guest.send(&frame(60));
    assert_eq!(guest.heard(), Some(frame(60)));
    // An available index that has run far ahead of the ring.
    guest.memory.write_obj(0x7000_u16, GuestAddress(guest.queues[1].avail_ring() + 2)).unwrap();
    guest.kick(1);
}

#[test]
fn a_full_tap_holds_the_guest_up() {
    let mut guest = Guest::new(ALL);
    let long = frame(60_000);
    guest.memory.write_slice(&long, GuestAddress(SENT)).unwrap();
    for _ in 0..100 {
        guest.queues[1].offer(&[(SENT, u32::try_from(long.len()).unwrap())], &[]);
    }
    guest.kick(1);
    let mut passed = 0;
    while guest.heard().is_some() {
        passed += 1;
        if passed == 1 {
            assert!(guest.counters().sent.packets < 100);
        }
        guest.run();
    }
    assert_eq!(passed, 100);
    assert_eq!(guest.counters().sent, Direction { packets: 100, bytes: 6_000_000, drops: 0 });
    guest.run();
    assert_eq!(guest.net().blocked, [false]);
}

#[test]
fn limits_hold_frames_up_in_their_direction() {
    let limit = |size| {
        Some(RateLimit {
            bytes: None,
            packets: Some(TokenBucket { size, burst: 1, refill_ms: 40 }),
        })
    };
    let limits = NetConfig { receive_limit: limit(2), send_limit: limit(1), ..config() };
    let mut guest = Guest::with(1, ALL, limits);
    let buffers: Vec<_> = (0..64).map(|index| (BUFFERS + 0x1000 * index, 1526)).collect();
    guest.give(&buffers);
    let start = Instant::now();
    for _ in 0..5 {
        guest.send(&frame(60));
        guest.wires[0].send(&frame(60)).unwrap();
    }
    guest.run();
    let counters = guest.counters();
    assert!(counters.sent.packets >= 2 && counters.received.packets >= 3);
    while guest.counters().sent.packets < 5 || guest.counters().received.packets < 5 {
        guest.manager.run_with_timeout(1000).unwrap();
        while guest.heard().is_some() {}
    }
    // Three more after two at once, at 25 a second.
    assert!(start.elapsed() >= Duration::from_millis(119), "{:?}", start.elapsed());
    assert_eq!(guest.counters().sent.drops + guest.counters().received.drops, 0);
}

#[test]
fn nothing_passes_while_the_link_is_down_or_the_machine_stands_still() {
    let mut guest = Guest::new(ALL);
    let status = |guest: &Guest| {
        let mut status = [0; 2];
        guest.net().config_read(6, &mut status);
        status
    };
    assert_eq!(status(&guest), [1, 0]);
    guest.give(&[(BUFFERS, 1526), (BUFFERS, 1526)]);
    assert!(!guest.net().set_link(true).unwrap());
    assert!(guest.net().set_link(false).unwrap());
    assert_eq!(status(&guest), [0, 0]);
    guest.run();
    guest.send(&frame(60));
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    assert!(guest.queues[0].take().is_none());
    assert!(guest.queues[1].take().is_some());
    assert_eq!((guest.counters().sent.drops, guest.counters().received.drops), (1, 1));
    assert!(guest.net().set_link(true).unwrap());
    guest.run();
    assert!(guest.queues[0].take().is_none(), "what came meanwhile is gone");

    guest.net().set_paused(true).unwrap();
    guest.send(&frame(60));
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    assert!(guest.queues[0].take().is_none() && guest.queues[1].take().is_none());
    guest.net().set_paused(false).unwrap();
    guest.run();
    assert!(guest.queues[0].take().is_some() && guest.queues[1].take().is_some());
}

#[test]
fn the_control_queue_answers() {
    let mut guest = Guest::with(2, ALL, config());
    assert_eq!(guest.queues.len(), 5);
    assert_eq!(guest.command(&[0, 0, 1]), 0);
    assert_eq!(guest.command(&[1, 1, 6, 5, 4, 3, 2, 1]), 0);
    let mut config = [0; 16];
    guest.net().config_read(0, &mut config);
    assert_eq!(config, [6, 5, 4, 3, 2, 1, 1, 0, 2, 0, 0x78, 5, 0, 0, 0, 0]);
    for bad in [&[0xff_u8, 0][..], &[4, 0, 3, 0], &[4, 0, 0, 0], &[4], &[]] {
        assert_eq!(guest.command(bad), 1, "{bad:?}");
    }
    // No room for an answer, a readable part behind a writable one: given back, and that is all.
    guest.queues[4].offer(&[(SENT, 3)], &[]);
    guest.kick(4);
    assert_eq!(guest.queues[4].take().unwrap().1, 0);
    // The second pair has frames only when it is used.
    guest.queues[2].offer(&[], &[(BUFFERS, 1526)]);
    guest.kick(2);
    guest.wires[1].send(&frame(60)).unwrap();
    guest.run();
    assert!(guest.queues[2].take().is_none());
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    assert_eq!(guest.queues[2].take().unwrap().1, 72);
    assert_eq!(guest.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(guest.net().save().driver.unwrap().offloads, 2);
}

#[test]
fn a_driver_that_knows_less_gets_less() {
    for (features, queues) in [(0, 2), (CONTROL, 3), (CONTROL | 1 << 22, 7)] {
        let mut guest = Guest::with(3, features, config());
        assert_eq!(guest.queues.len(), queues);
        guest.send(&frame(60));
        assert_eq!(guest.heard(), Some(frame(60)));
        if queues > 2 {
            assert_eq!(guest.command(&[0, 0, 1]), 1, "not agreed on");
        }
    }
}

#[test]
fn a_reset_forgets_everything_of_the_guest() {
    let mut guest = Guest::new(ALL);
    for _ in 0..3 {
        guest.give(&[(BUFFERS, 1526)]);
        guest.wires[0].send(&frame(4000)).unwrap();
        guest.run();
        guest.net().reset();
        assert!(guest.net().positions().is_empty());
        guest.wires[0].send(&frame(60)).unwrap();
        guest.run();
        guest.activate();
        guest.give(&[(BUFFERS, 1526)]);
        assert_eq!(guest.queues[0].take().unwrap().1, 72);
    }
}

#[test]
fn state_survives_a_round_trip() {
    let mut guest = Guest::with(2, ALL, config());
    guest.give(&[(BUFFERS, 1526), (BUFFERS, 1526)]);
    guest.wires[0].send(&frame(60)).unwrap();
    guest.run();
    guest.command(&[4, 0, 2, 0]);
    guest.command(&[1, 1, 6, 5, 4, 3, 2, 1]);
    guest.net().set_link(false).unwrap();
    // The second buffer has been taken ahead, but as if it had not.
    let positions = guest.net().positions();
    assert_eq!((positions[0].next_avail, positions[0].next_used), (1, 1));
    assert_eq!(positions.len(), 5);
    let text = serde_json::to_string(&guest.net().save()).unwrap();
    let state: NetState = serde_json::from_str(&text).unwrap();

    let fresh = || {
        let taps = (0..2).map(|_| Tap::stand_in(UnixDatagram::unbound().unwrap().into()).unwrap());
        Net::over(taps.collect(), config(), logger()).unwrap()
    };
    let mut other = fresh();
    other.restore(&state).unwrap();
    let queues = guest.queues.iter().map(DriverQueue::activate).collect();
    let memory = (*guest.memory).clone().into();
    other.activate(Activation { memory, features: guest.features, queues }).unwrap();
    assert_eq!(other.save(), state);
    other.reset();
    assert_eq!(other.save().driver, None);

    let refuse = |change: &dyn Fn(&mut NetState)| {
        let mut wrong = state.clone();
        change(&mut wrong);
        fresh().restore(&wrong).unwrap_err()
    };
    let error = refuse(&|state| state.version = 9);
    assert!(matches!(error, RestoreError::Version { found: 9, known: 1 }));
    let changes: [&dyn Fn(&mut NetState); 6] = [
        &|state| state.pairs = 1,
        &|state| state.features |= 1 << 54,
        &|state| state.mtu = None,
        &|state| state.mac = [0xff; 6],
        &|state| state.driver.as_mut().unwrap().pairs = 3,
        &|state| state.driver.as_mut().unwrap().offloads = 1,
    ];
    for change in changes {
        assert!(matches!(refuse(change), RestoreError::Mismatch(_)));
    }
}

#[test]
fn what_makes_no_device_is_named() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let refuse = |config| Net::new(config, logger()).err().unwrap();
    assert!(matches!(refuse(config()), NetError::Pairs(0)));
    let taps = (0..33).map(|_| null()).collect();
    assert!(matches!(refuse(NetConfig { taps, ..config() }), NetError::Pairs(33)));
    let error = refuse(NetConfig { taps: vec![null()], ..config() });
    assert_eq!(error.to_string(), "the descriptor is no tap, or attached to none");
    let over = |config| {
        let tap = Tap::stand_in(UnixDatagram::unbound().unwrap().into()).unwrap();
        Net::over(vec![tap], config, logger()).err().unwrap()
    };
    assert!(matches!(over(NetConfig { mac: [1; 6], ..config() }), NetError::Mac));
    assert!(matches!(over(NetConfig { mac: [0; 6], ..config() }), NetError::Mac));
    assert!(matches!(over(NetConfig { mtu: Some(67), ..config() }), NetError::Mtu(67)));
    let error = over(NetConfig { vhost: vec![null(), null()], ..config() });
    assert!(matches!(error, NetError::Vhosts { vhost: 2, pairs: 1 }));
    let error = over(NetConfig { vhost: vec![null()], ..config() });
    assert!(error.to_string().contains("/dev/vhost-net"), "{error}");
    let nothing = Some(TokenBucket { size: 0, burst: 0, refill_ms: 1 });
    let limit = Some(RateLimit { bytes: nothing, packets: None });
    assert!(matches!(over(NetConfig { send_limit: limit, ..config() }), NetError::Limit(_)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever lies in the queues' memory: no panic, no endless turn.
    #[test]
    fn any_queue_is_survived(
        table in prop::collection::vec(any::<(u32, u16, u8, u8)>(), 64),
        heads in prop::collection::vec(0_u16..70, 1..64),
        header in any::<[u8; 12]>(),
        frames in prop::collection::vec(0_usize..9000, 0..8),
    ) {
        let mut guest = Guest::new(ALL);
        for index in 0..256 {
            guest.memory.write_slice(&header, GuestAddress(SENT + 0x1000 * index)).unwrap();
        }
        for queue in 0..3 {
            let base = 0x4000 * queue as u64;
            for (index, &(address, len, flags, next)) in (0..).zip(&table) {
                let at = GuestAddress(base + 16 * index);
                // Mostly in memory.
                let address = u64::from(address) % 0x110_0000;
                guest.memory.write_obj(address, at).unwrap();
                guest.memory.write_obj(u32::from(len) % 5000, at.unchecked_add_bytes(8)).unwrap();
                guest.memory.write_obj(u16::from(flags % 8), at.unchecked_add_bytes(12)).unwrap();
                guest.memory.write_obj(u16::from(next % 70), at.unchecked_add_bytes(14)).unwrap();
            }
            for &head in &heads {
                guest.queues[queue].publish(head);
            }
            guest.kick(queue);
        }
        for len in frames {
            let _ = guest.wires[0].send(&frame(len));
            guest.run();
            while guest.heard().is_some() {}
        }
        guest.net().reset();
        guest.run();
    }
}

trait Offset {
    fn unchecked_add_bytes(self, count: u64) -> Self;
}

impl Offset for GuestAddress {
    fn unchecked_add_bytes(self, count: u64) -> Self {
        GuestAddress(self.0 + count)
    }
}

/// A real tap, in a network namespace of the test's own thread.
mod real {
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    const NAME: &[u8] = b"husk0";

    fn request() -> libc::ifreq {
        // SAFETY: all zeroes is an empty request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
            *to = libc::c_char::try_from(*from).unwrap();
        }
        request
    }

    fn queue(flags: libc::c_int) -> OwnedFd {
        let options = || File::options().read(true).write(true).clone();
        let file = options().custom_flags(libc::O_CLOEXEC).open("/dev/net/tun").unwrap();
        let mut request = request();
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        // SAFETY: the pointer is that of a request.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        file.into()
    }

    /// Does `work` where there are no other interfaces, if that is allowed.
    fn apart(work: impl FnOnce() + Send + 'static) {
        let thread = husk_skip::spawn(move || {
            // SAFETY: takes a number; only this thread leaves its namespace.
            let left = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            if left != 0 || !std::path::Path::new("/dev/net/tun").exists() {
                return husk_skip::skipped("no network namespace, or no /dev/net/tun");
            }
            work();
        });
        thread.join().unwrap();
    }

    /// Brings the tap up, and a socket that sends and receives its frames.
    fn wire() -> File {
        let protocol = i32::from(0x0003_u16.to_be()); // all
        // SAFETY: plain numbers.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol) };
        assert!(socket >= 0);
        // SAFETY: the call has just made it, and nobody else knows it.
        let socket = unsafe { File::from_raw_fd(socket) };
        let mut request = request();
        request.ifr_ifru.ifru_flags =
            libc::c_short::try_from(libc::IFF_UP | libc::IFF_NOARP).unwrap();
        // SAFETY: the pointer is that of a request.
        let up = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
        assert_eq!(up, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: as above.
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX as _, &raw mut request) };
        // SAFETY: all zeroes is an empty address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = 0x0003_u16.to_be();
        // SAFETY: the call has filled it in.
        address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
        let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: pointer and length are those of the address.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
        let limit = libc::timeval { tv_sec: 5, tv_usec: 0 };
        let len = libc::socklen_t::try_from(size_of_val(&limit)).unwrap();
        // SAFETY: pointer and length are those of the limit.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                len,
            );
        }
        socket
    }

    const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

    /// An Ethernet frame of a protocol nobody listens to, with its virtio header.
    fn ethernet(len: usize) -> Vec<u8> {
        let mut frame = frame(len);
        frame[12..18].fill(0xff);
        frame[18..24].copy_from_slice(&MAC);
        frame[24..26].copy_from_slice(&[0x88, 0xb5]);
        frame
    }

    /// What comes over the wire that is one of ours.
    fn hear(wire: &mut File) -> Vec<u8> {
        let mut bytes = vec![0; 0x1_0000];
        loop {
            let len = wire.read(&mut bytes).unwrap();
            if bytes[12..14] == [0x88, 0xb5] || bytes[12..14] == [8, 0] {
                bytes.truncate(len);
                return bytes;
            }
        }
    }

    #[test]
    fn frames_pass_over_a_tap() {
        apart(|| {
            let tap = Tap::new(queue(FLAGS), false).unwrap();
            let mut guest = Guest::over(vec![tap], Vec::new(), ALL, config());
            let mut wire = wire();
            let sent = ethernet(100);
            guest.send(&sent);
            assert_eq!(hear(&mut wire), sent[12..]);
            let buffers: Vec<_> = (0..64).map(|index| (BUFFERS + 0x1000 * index, 1526)).collect();
            guest.give(&buffers);
            wire.write_all(&ethernet(900)[12..]).unwrap();
            loop {
                guest.manager.run_with_timeout(5000).unwrap();
                let Some((head, len)) = guest.queues[0].take() else { panic!("nothing came") };
                let at = BUFFERS + 0x1000 * u64::from(head);
                let bytes = guest.read(at, usize::try_from(len).unwrap());
                // The host's own first words on a new interface come too.
                if bytes[24..26] == [0x88, 0xb5] {
                    assert_eq!(bytes[12..], ethernet(900)[12..]);
                    assert_eq!(bytes[10..12], [1, 0]);
                    break;
                }
            }
            // A segment that the host is to cut, and a checksum that it is to fill in.
            let mut long = vec![1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
            long.extend([0xff; 6]);
            long.extend(MAC);
            long.extend([8, 0, 0x45, 0, 0x0b, 0xb8 - 14, 0, 0, 0, 0, 64, 6, 0, 0]);
            long.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            long.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
            long.resize(12 + 3000, 7);
            guest.send(&long);
            assert_eq!(hear(&mut wire).len(), 3000, "whole, as nothing has cut it yet");
            assert_eq!(guest.counters().sent.drops, 0);
        });
    }

    #[test]
    fn queues_that_are_not_used_are_detached() {
        apart(|| {
            let flags = FLAGS | libc::IFF_MULTI_QUEUE;
            let taps = vec![queue(flags), queue(flags), queue(flags)];
            let net = Net::new(NetConfig { taps, ..config() }, logger()).unwrap();
            let taps = net.features() & 1 << 22;
            assert_ne!(taps, 0, "several queues are offered");
            drop(net);
            let taps = [queue(flags), queue(flags)].map(|fd| Tap::new(fd, true).unwrap());
            let mut guest = Guest::over(taps.into(), Vec::new(), ALL, config());
            let mut wire = wire();
            for queue in [0, 2] {
                for index in 0..64 {
                    guest.queues[queue].offer(&[], &[(BUFFERS + 0x1000 * index, 1526)]);
                }
                guest.kick(queue);
            }
            // Only the first one is attached: whatever the flow, it comes there.
            let mut came = [0, 0];
            for pairs in [1, 2, 1] {
                assert_eq!(guest.command(&[4, 0, pairs, 0]), 0);
                for flow in 0..8 {
                    let mut frame = ethernet(100);
                    frame[30] = flow;
                    wire.write_all(&frame[12..]).unwrap();
                }
                let end = Instant::now() + Duration::from_secs(5);
                let before = came;
                while came[0] + came[1] < before[0] + before[1] + 8 && Instant::now() < end {
                    guest.manager.run_with_timeout(100).unwrap();
                    for (index, queue) in [0, 2].into_iter().enumerate() {
                        while guest.queues[queue].take().is_some() {
                            came[index] += 1;
                        }
                    }
                }
                if pairs == 1 {
                    assert_eq!(came[1], before[1]);
                }
            }
            assert!(came[0] >= 16, "{came:?}");
        });
    }

    #[test]
    fn a_tap_of_another_kind_is_refused() {
        apart(|| {
            let bare = queue(libc::IFF_TAP | libc::IFF_NO_PI);
            let error = Tap::new(bare, false).err().unwrap();
            assert!(error.to_string().contains("IFF_VNET_HDR"), "{error}");
            let error = Tap::new(queue(FLAGS), true).err().unwrap();
            assert!(error.to_string().contains("IFF_MULTI_QUEUE"), "{error}");
            let tun = queue(libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
            assert!(Tap::new(tun, false).is_err());
        });
    }

    /// Waits for the next used chain of a queue that the kernel serves.
    fn await_used(guest: &mut Guest, queue: usize) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(used) = guest.queues[queue].take() {
                return used;
            }
            assert!(Instant::now() < end, "the kernel gives nothing back");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a frame through the kernel and receives one.
    fn exchange(guest: &mut Guest, wire: &mut File) {
        guest.send(&ethernet(100));
        assert_eq!(hear(wire), ethernet(100)[12..]);
        assert_eq!(await_used(guest, 1).1, 0);
        for index in 0..32 {
            guest.queues[0].offer(&[], &[(BUFFERS + 0x1000 * index, 1526)]);
        }
        guest.kick(0);
        wire.write_all(&ethernet(900)[12..]).unwrap();
        loop {
            let (_, len) = await_used(guest, 0);
            // The host's own first words on a new interface come too.
            if len == 912 {
                return;
            }
        }
    }

    #[test]
    fn the_kernel_carries_frames() {
        let vhost = || File::options().read(true).write(true).open("/dev/vhost-net");
        if vhost().is_err() {
            return husk_skip::skipped("no /dev/vhost-net");
        }
        apart(move || {
            let tap = Tap::new(queue(FLAGS), false).unwrap();
            let vhost = vec![OwnedFd::from(vhost().unwrap())];
            let mut guest =
                Guest::over(vec![tap], Vec::new(), ALL, NetConfig { vhost, ..config() });
            assert!(guest.net().is_in_kernel());
            let mut wire = wire();
            exchange(&mut guest, &mut wire);
            let interrupt = guest.queues[0].interrupt.clone();
            assert!(crate::vm::MsiVector::event(&*interrupt).read().unwrap() > 0);
            assert_eq!(guest.command(&[0, 0, 1]), 0, "the control queue stays here");
            assert_eq!(guest.counters(), Counters::default());

            // What is sent while the link is down waits.
            guest.net().set_link(false).unwrap();
            guest.send(&ethernet(100));
            std::thread::sleep(Duration::from_millis(50));
            assert!(guest.queues[1].take().is_none());
            let positions = guest.net().positions();
            assert_eq!((positions[1].next_avail, positions[1].next_used), (1, 1));
            assert_eq!(positions.len(), 3);
            guest.net().set_link(true).unwrap();
            await_used(&mut guest, 1);
            assert_eq!(guest.net().positions()[1].next_avail, 2);
            hear(&mut wire);

            // Bad queues are the kernel's to survive; then the driver starts over.
            guest.queues[1].publish(u16::MAX);
            guest.kick(1);
            guest.net().reset();
            assert!(guest.net().positions().is_empty());
            guest.activate();
            exchange(&mut guest, &mut wire);
        });
    }
}
