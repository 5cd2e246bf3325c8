//! The device as a guest's driver and the host ends see it, through a real event loop.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{HEADER, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op};
use super::{BUFFER, ConnectError, Listener, StreamSink, Vsock, VsockState};
use crate::devices::virtio::state::RestoreError;
use crate::devices::virtio::testing::{DriverQueue, logger};
use crate::devices::virtio::{Activation, VirtioDevice};
use crate::vm::GuestMemory;

const RX_BUFFER: u32 = 4096;
const RX_AREA: u64 = 0x10_0000;
const TX_AREA: u64 = 0x40_0000;
const GUEST_BUFFER: u32 = 64 * 1024;

type Answer = (u64, Result<UnixStream, ConnectError>);

#[derive(Default, Clone)]
struct Streams {
    /// The other end of the socket that the device was given.
    given: Arc<Mutex<Option<OwnedFd>>>,
    accepted: Arc<Mutex<Vec<(u32, UnixStream)>>>,
    connected: Arc<Mutex<Vec<Answer>>>,
}

impl StreamSink for Streams {
    fn connection(&mut self, port: u32, stream: Option<OwnedFd>) {
        let stream = stream.or_else(|| self.given.lock().unwrap().take()).unwrap();
        self.accepted.lock().unwrap().push((port, stream.into()));
    }
    fn connected(&mut self, request: u64, result: Result<OwnedFd, ConnectError>) {
        self.connected.lock().unwrap().push((request, result.map(UnixStream::from)));
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    kicks: Vec<EventFd>,
    vsock: Arc<Mutex<Vsock>>,
    streams: Streams,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.refill();
        guest
    }

    fn without_buffers() -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x80_0000)]).unwrap());
        let streams = Streams::default();
        let vsock = Vsock::new(Box::new(streams.clone()), logger()).unwrap();
        let vsock = Arc::new(Mutex::new(vsock));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().unwrap();
        manager.add_subscriber(vsock.clone());
        let mut guest = Self {
            rx: DriverQueue::new(&memory, 0, 128),
            tx: DriverQueue::new(&memory, 0x1_0000, 128),
            event: DriverQueue::new(&memory, 0x2_0000, 16),
            memory,
            kicks: Vec::new(),
            vsock,
            streams,
            manager,
        };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.memory.write_slice(&[0; 0x3_0000], GuestAddress(0)).unwrap();
        self.rx = DriverQueue::new(&self.memory, 0, 128);
        self.tx = DriverQueue::new(&self.memory, 0x1_0000, 128);
        self.event = DriverQueue::new(&self.memory, 0x2_0000, 16);
        let queues = vec![self.rx.activate(), self.tx.activate(), self.event.activate()];
        self.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let activation = Activation { memory: (*self.memory).clone().into(), features: 0, queues };
        self.vsock.lock().unwrap().activate(activation).unwrap();
        self.run();
    }

    /// Lets the event loop do all there is.
    fn run(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }

    fn kick(&mut self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
        self.run();
    }

    fn refill(&mut self) {
        while self.rx.free() > 0 {
            // Which buffer is told by its head: descriptors and buffers go together.
            let head = self.rx.offer(&[], &[(0, RX_BUFFER)]);
            let entry = 16 * u64::from(head);
            let address = RX_AREA + u64::from(head) * u64::from(RX_BUFFER);
            self.memory.write_obj(address, GuestAddress(entry)).unwrap();
        }
        self.kick(0);
    }

    fn header(op: u16, guest: u32, host: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            kind: STREAM,
            op,
            buf_alloc: GUEST_BUFFER,
            ..Header::default()
        }
    }

    /// Puts a packet into the transmit queue, in several descriptors.
    fn send(&mut self, header: &Header, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let slot = u64::try_from(self.tx.free()).unwrap();
        let area = TX_AREA + (slot % 16) * 0x2_0000;
        self.memory.write_slice(&header.encode(), GuestAddress(area)).unwrap();
        self.memory.write_slice(data, GuestAddress(area + 100)).unwrap();
        let half = len / 2;
        let pieces = [
            (area, 20),
            (area + 20, 24),
            (area + 100, half),
            (area + 100 + u64::from(half), len - half),
        ];
        self.tx.offer(&pieces, &[]);
        self.kick(1);
        while self.tx.take().is_some() {}
    }

    fn data(&mut self, guest: u32, host: u32, fwd_cnt: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.send(&Header { len, fwd_cnt, ..Self::header(op::RW, guest, host) }, data);
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.take()?;
        let area = GuestAddress(RX_AREA + u64::from(head) * u64::from(RX_BUFFER));
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, area).unwrap();
        let header = Header::decode(bytes[..HEADER].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (2, 3));
        assert_eq!(usize::try_from(header.len).unwrap(), bytes.len() - HEADER);
        Some((header, bytes.split_off(HEADER)))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, data) = self.receive().expect("a packet");
        assert_eq!(header.op, op, "{header:?}");
        assert!(data.is_empty());
        header
    }

    /// Connects from the guest to a host port; returns the host end.
    fn open(&mut self, guest: u32, host: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        *self.streams.given.lock().unwrap() = Some(theirs.into());
        self.vsock.lock().unwrap().listen(host, Listener::over(ours.into(), None));
        self.send(&Self::header(op::REQUEST, guest, host), &[]);
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (host, guest));
        assert_eq!(response.buf_alloc, BUFFER);
        let (port, stream) = self.streams.accepted.lock().unwrap().pop().unwrap();
        assert_eq!(port, host);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    fn streams(&self) -> u64 {
        self.vsock.lock().unwrap().counters().streams
    }
}

fn is_open(stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let result = (&*stream).read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    matches!(result, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn only_open_ports_can_be_reached_and_once_means_once() {
    let mut guest = Guest::new();
    guest.send(&Guest::header(op::REQUEST, 7, 1024), &[]);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (1024, 7));
    let _stream = guest.open(7, 1024);
    guest.send(&Guest::header(op::REQUEST, 8, 1024), &[]);
    guest.expect(op::RST);
    guest.vsock.lock().unwrap().listen(9, Listener::pairs());
    for port in 100..103 {
        guest.send(&Guest::header(op::REQUEST, port, 9), &[]);
        guest.expect(op::RESPONSE);
    }
    assert_eq!(guest.streams(), 4);
    guest.vsock.lock().unwrap().unlisten(9);
    guest.send(&Guest::header(op::REQUEST, 103, 9), &[]);
    guest.expect(op::RST);
}

#[test]
fn a_port_that_is_for_one_of_the_guests_ports_is_for_no_other() {
    let mut guest = Guest::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    *guest.streams.given.lock().unwrap() = Some(theirs.into());
    guest.vsock.lock().unwrap().listen(1024, Listener::over(ours.into(), Some(70_007)));
    for port in (1..300).chain([70_006, 70_008, u32::MAX]) {
        guest.refill();
        guest.send(&Guest::header(op::REQUEST, port, 1024), &[]);
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (1024, port));
    }
    assert_eq!(guest.streams(), 0);
    guest.send(&Guest::header(op::REQUEST, 70_007, 1024), &[]);
    guest.expect(op::RESPONSE);
    assert_eq!(guest.streams(), 1);
    // Neither does another take what has been taken.
    guest.send(&Guest::header(op::REQUEST, 7, 1024), &[]);
    guest.expect(op::RST);
    assert_eq!(guest.streams(), 1);
}

#[test]
fn data_flow_both_ways_and_ends_are_passed_on_one_by_one() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    guest.data(7, 1024, 0, b"from the guest");
    let mut bytes = [0; 32];
    let count = host.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"from the guest");
    host.write_all(b"from the host").unwrap();
    guest.run();
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, &*data), (op::RW, &b"from the host"[..]));
    assert!(guest.rx.interrupt.take() > 0);

    // The guest has said all; the host has not.
    guest.send(&Header { flags: SHUTDOWN_SEND, ..Guest::header(op::SHUTDOWN, 7, 1024) }, &[]);
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    host.write_all(b"still talking").unwrap();
    guest.run();
    assert_eq!(guest.receive().unwrap().1, b"still talking");
    host.shutdown(std::net::Shutdown::Write).unwrap();
    guest.run();
    let shutdown = guest.expect(op::SHUTDOWN);
    assert_ne!(shutdown.flags & SHUTDOWN_SEND, 0);
    guest.send(&Guest::header(op::RST, 7, 1024), &[]);
    assert_eq!(guest.streams(), 0);
    assert!(guest.receive().is_none());
}

#[test]
fn a_host_that_has_only_stopped_writing_still_gets_everything() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    host.write_all(b"the end").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    guest.run();
    assert_eq!(guest.receive().unwrap().1, b"the end");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.data(7, 1024, 7, b"answer");
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    guest.send(&Header { flags: both, ..Guest::header(op::SHUTDOWN, 7, 1024) }, &[]);
    guest.expect(op::RST);
    let mut answer = Vec::new();
    host.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    assert_eq!(guest.streams(), 0);
}

#[test]
fn what_a_closing_host_has_written_still_arrives() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    host.write_all(&[1; 10_000]).unwrap();
    drop(host);
    guest.run();
    let mut got = 0;
    let mut flags = 0;
    while let Some((header, data)) = guest.receive() {
        match header.op {
            op::RW => got += data.len(),
            op::SHUTDOWN => flags |= header.flags,
            other => panic!("unexpected {other}"),
        }
    }
    assert_eq!(got, 10_000);
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // Data for a host that has gone is dropped, and credit regained.
    guest.data(7, 1024, 10_000, &[0; 60_000]);
    assert_eq!(guest.vsock.lock().unwrap().unsent(), 0);
    guest.send(&Guest::header(op::RST, 7, 1024), &[]);
    assert_eq!(guest.streams(), 0);
}

#[test]
fn a_guest_that_takes_nothing_more_hears_of_the_hosts_end() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    guest.send(&Header { flags: SHUTDOWN_RECEIVE, ..Guest::header(op::SHUTDOWN, 7, 1024) }, &[]);
    assert!(host.write_all(b"too late").is_err());
    guest.data(7, 1024, 0, b"still talking");
    let mut bytes = [0; 32];
    assert_eq!(host.read(&mut bytes).unwrap(), 13);
    drop(host);
    guest.run();
    let flags = guest.expect(op::SHUTDOWN).flags;
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(&Guest::header(op::RST, 7, 1024), &[]);
    assert_eq!(guest.streams(), 0);
}

#[test]
fn a_slow_host_gets_all_of_it_even_after_the_guest_has_gone() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    // More than the socket takes, so that some is kept.
    let mut sent = Vec::new();
    let mut known = 0_u32;
    let mut chunk = 0_u8;
    while guest.vsock.lock().unwrap().unsent() < 100_000 {
        let under_way = u32::try_from(sent.len()).unwrap() - known;
        assert!(under_way + 32_000 <= BUFFER, "credit came back too late");
        let data = vec![chunk; 32_000];
        chunk = chunk.wrapping_add(1);
        guest.data(7, 1024, 0, &data);
        sent.extend(data);
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            known = header.fwd_cnt;
        }
        guest.refill();
    }
    guest.send(&Guest::header(op::RST, 7, 1024), &[]);
    assert_eq!(guest.streams(), 1);
    // The ports are free for a new connection meanwhile.
    let other = guest.open(7, 1024);
    assert!(is_open(&other));
    let mut got = vec![0; sent.len()];
    let mut done = 0;
    while done < got.len() {
        done += host.read(&mut got[done..]).unwrap();
        guest.run();
    }
    assert!(got == sent);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.streams(), 1);
    assert!(is_open(&other));
}

#[test]
fn a_guest_without_credit_is_cut_off() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    let mut sent = 0;
    // Nobody reads at the host end, and the guest does not care for credit.
    let reset = loop {
        guest.data(7, 1024, 0, &[9; 65_000]);
        sent += 65_000;
        let mut reset = false;
        while let Some((header, _)) = guest.receive() {
            reset |= header.op == op::RST;
        }
        guest.refill();
        if reset || sent > 10_000_000 {
            break reset;
        }
    };
    assert!(reset);
    assert!(guest.vsock.lock().unwrap().unsent() <= usize::try_from(BUFFER).unwrap());
    let mut got = vec![0; sent];
    let mut done = 0;
    loop {
        let count = host.read(&mut got[done..]).unwrap();
        if count == 0 {
            break;
        }
        done += count;
        guest.run();
    }
    assert_eq!(done, sent - 65_000, "what came before is delivered");
}

#[test]
fn the_guests_credit_is_kept() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    host.set_nonblocking(true).unwrap();
    let _ = host.write(&[5; 200_000]);
    guest.run();
    let mut got = 0;
    let mut asked = 0;
    while let Some((header, data)) = guest.receive() {
        got += u32::try_from(data.len()).unwrap();
        asked += u32::from(header.op == op::CREDIT_REQUEST);
    }
    assert_eq!(got, GUEST_BUFFER);
    assert_eq!(asked, 1);
    guest.refill();
    assert!(guest.receive().is_none());
    let update = Header { fwd_cnt: 10_000, ..Guest::header(op::CREDIT_UPDATE, 7, 1024) };
    guest.send(&update, &[]);
    let mut more = 0;
    while let Some((_, data)) = guest.receive() {
        more += data.len();
    }
    assert_eq!(more, 10_000);
}

#[test]
fn ten_megabytes_echoed() {
    const TOTAL: usize = 10 << 20;
    let mut guest = Guest::new();
    let host = guest.open(7, 1024);
    let echo = std::thread::spawn(move || {
        let (mut reader, mut writer) = (&host, &host);
        let count = std::io::copy(&mut reader, &mut writer).unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        count
    });
    let byte = |at: usize| u8::try_from((at.wrapping_mul(2_654_435_761) >> 13) & 0xff).unwrap();
    let (mut sent, mut got) = (0_usize, 0_usize);
    let (mut known, mut ended) = (0_u32, false);
    while !ended {
        let room = usize::try_from(BUFFER).unwrap()
            - usize::try_from(u32::try_from(sent).unwrap().wrapping_sub(known)).unwrap();
        let count = room.min(65_000).min(TOTAL - sent);
        if count > 0 {
            let data: Vec<u8> = (sent..sent + count).map(byte).collect();
            guest.data(7, 1024, u32::try_from(got).unwrap(), &data);
            sent += count;
            if sent == TOTAL {
                let shut = Header {
                    flags: SHUTDOWN_SEND,
                    fwd_cnt: u32::try_from(got).unwrap(),
                    ..Guest::header(op::SHUTDOWN, 7, 1024)
                };
                guest.send(&shut, &[]);
            }
        }
        guest.manager.run_with_timeout(1).unwrap();
        let before = got;
        while let Some((header, data)) = guest.receive() {
            known = header.fwd_cnt;
            for value in data {
                assert_eq!(value, byte(got), "at {got}");
                got += 1;
            }
            ended |= header.op == op::SHUTDOWN;
        }
        guest.refill();
        if got != before {
            let fwd_cnt = u32::try_from(got).unwrap();
            let update = Header { fwd_cnt, ..Guest::header(op::CREDIT_UPDATE, 7, 1024) };
            guest.send(&update, &[]);
        }
    }
    assert_eq!(got, TOTAL);
    assert_eq!(usize::try_from(echo.join().unwrap()).unwrap(), TOTAL);
    let counters = guest.vsock.lock().unwrap().counters();
    assert_eq!(counters.from_guest, 10 << 20);
    assert_eq!(counters.to_guest, 10 << 20);
}

#[test]
fn the_host_can_connect() {
    let mut guest = Guest::new();
    guest.vsock.lock().unwrap().connect(22, 5).unwrap();
    guest.run();
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 22);
    guest.send(&Guest::header(op::RESPONSE, 22, request.src_port), &[]);
    let (id, stream) = guest.streams.connected.lock().unwrap().pop().unwrap();
    assert_eq!(id, 5);
    let mut stream = stream.unwrap();
    stream.write_all(b"hello").unwrap();
    guest.run();
    assert_eq!(guest.receive().unwrap().1, b"hello");

    guest.vsock.lock().unwrap().connect(23, 6).unwrap();
    guest.run();
    let request = guest.expect(op::REQUEST);
    guest.send(&Guest::header(op::RST, 23, request.src_port), &[]);
    let (id, result) = guest.streams.connected.lock().unwrap().pop().unwrap();
    assert!(id == 6 && matches!(result, Err(ConnectError::Refused)));

    guest.vsock.lock().unwrap().connect(24, 7).unwrap();
    guest.run();
    guest.vsock.lock().unwrap().reset();
    guest.run();
    let (id, result) = guest.streams.connected.lock().unwrap().pop().unwrap();
    assert!(id == 7 && matches!(result, Err(ConnectError::Reset)));
    let error = guest.vsock.lock().unwrap().connect(25, 8).unwrap_err();
    assert!(matches!(error, ConnectError::NotReady));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.streams(), 0);
    guest.activate();
    guest.refill();
    guest.open(7, 1024);
}

#[test]
fn connections_take_turns_and_wait_for_buffers() {
    let mut guest = Guest::new();
    let mut hosts: Vec<_> = (0..3).map(|port| guest.open(port, 1024)).collect();
    // All buffers are used up, so that nothing can go before all three have something.
    while guest.rx.free() < 128 {
        hosts[0].write_all(b"x").unwrap();
        guest.run();
        guest.receive();
    }
    for host in &mut hosts {
        host.write_all(&[1; 50_000]).unwrap();
    }
    guest.run();
    guest.refill();
    let mut order = Vec::new();
    let mut counts = [0_usize; 3];
    for _ in 0..100 {
        while let Some((header, data)) = guest.receive() {
            order.push(header.dst_port);
            counts[usize::try_from(header.dst_port).unwrap()] += data.len();
        }
        guest.refill();
    }
    assert_eq!(counts, [50_000; 3]);
    let first_of_last = order.iter().position(|&port| port == 2).unwrap();
    let last_of_first = order.iter().rposition(|&port| port == 0).unwrap();
    assert!(first_of_last < last_of_first, "{order:?}");
}

#[test]
fn hostile_packets_do_no_harm() {
    let mut guest = Guest::new();
    let mut host = guest.open(7, 1024);
    // Shorter than a header; nothing at all; for somebody else; of another type; unknown.
    guest.tx.offer(&[(TX_AREA, 20)], &[]);
    guest.tx.offer(&[(TX_AREA, 0)], &[]);
    guest.tx.offer(&[(u64::MAX - 3, 44)], &[]);
    guest.tx.offer(&[], &[(TX_AREA, 44)]);
    guest.tx.offer(&[(TX_AREA, 44), (TX_AREA, 1 << 20)], &[]);
    guest.tx.publish(500);
    guest.kick(1);
    while guest.tx.take().is_some() {}
    guest.send(&Header { src_cid: 9, ..Guest::header(op::RW, 7, 1024) }, &[]);
    guest.send(&Header { dst_cid: 1, ..Guest::header(op::REQUEST, 8, 1024) }, &[]);
    assert!(guest.receive().is_none());
    guest.send(&Header { kind: 2, ..Guest::header(op::REQUEST, 8, 1024) }, &[]);
    assert_eq!(guest.expect(op::RST).kind, 2);
    guest.send(&Guest::header(op::RW, 99, 1024), &[]);
    guest.expect(op::RST);
    guest.send(&Guest::header(op::RST, 99, 1024), &[]);
    assert!(guest.receive().is_none(), "no reset for a reset");
    assert!(is_open(&host));
    // A length that lies ends the connection.
    guest.send(&Header { len: 100, ..Guest::header(op::RW, 7, 1024) }, b"short");
    guest.expect(op::RST);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    for bad in [op::REQUEST, op::RESPONSE, 0, 99] {
        let host = guest.open(7, 1024);
        guest.send(&Guest::header(bad, 7, 1024), &[]);
        guest.expect(op::RST);
        assert!(!is_open(&host));
    }
}

#[test]
fn bad_receive_buffers_are_passed_over() {
    let mut guest = Guest::without_buffers();
    guest.vsock.lock().unwrap().listen(1024, Listener::pairs());
    guest.send(&Guest::header(op::REQUEST, 7, 1024), &[]);
    guest.rx.offer(&[], &[(RX_AREA, 10)]);
    guest.rx.offer(&[(RX_AREA, 100)], &[]);
    guest.rx.offer(&[], &[(u64::MAX - 100, 4096)]);
    guest.kick(0);
    for _ in 0..3 {
        assert_eq!(guest.rx.take().unwrap().1, 0);
    }
    assert!(guest.receive().is_none());
    guest.refill();
    guest.expect(op::RESPONSE);
    let mut host = guest.streams.accepted.lock().unwrap().pop().unwrap().1;
    // Good and bad ones by turns, under a burst.
    while guest.receive().is_some() {}
    host.write_all(&[3; 30_000]).unwrap();
    let mut got = 0;
    for _ in 0..50 {
        guest.run();
        while let Some((head, len)) = guest.rx.take() {
            if len > 0 {
                got += usize::try_from(len).unwrap() - HEADER;
            }
            let _ = head;
        }
        if guest.rx.free() > 0 {
            guest.rx.offer(&[], &[(RX_AREA, 4)]);
        }
        guest.refill();
    }
    assert_eq!(got, 30_000);
}

#[test]
fn resets_do_not_pile_up_without_buffers() {
    let mut guest = Guest::without_buffers();
    for port in 0..100_u32 {
        guest.send(&Guest::header(op::RW, port, 9), &[]);
    }
    for _ in 0..60_u32 {
        guest.tx.offer(&[(TX_AREA, 44)], &[]);
        if guest.tx.free() == 0 {
            break;
        }
    }
    guest.kick(1);
    while guest.tx.take().is_some() {}
    assert!(guest.tx.free() < 128, "packets wait");
    for _ in 0..5 {
        guest.refill();
        while guest.receive().is_some() {}
    }
    while guest.tx.take().is_some() {}
    assert_eq!(guest.tx.free(), 128);
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let state = Guest::new().vsock.lock().unwrap().save();
    let text = serde_json::to_string(&state).unwrap();
    let mut state: VsockState = serde_json::from_str(&text).unwrap();
    let mut guest = Guest::new();
    guest.vsock.lock().unwrap().restore(&state).unwrap();
    guest.vsock.lock().unwrap().reset();
    guest.run();
    guest.activate();
    guest.memory.write_slice(&[0xff; 8], GuestAddress(TX_AREA)).unwrap();
    let head = guest.event.offer(&[], &[(TX_AREA, 4)]);
    guest.kick(2);
    assert_eq!(guest.event.take(), Some((head, 4)));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(TX_AREA)).unwrap(), 0);
    guest.event.offer(&[], &[(TX_AREA, 4)]);
    guest.kick(2);
    assert_eq!(guest.event.take(), None, "only once");
    state.version = 7;
    let error = guest.vsock.lock().unwrap().restore(&state).unwrap_err();
    assert!(matches!(error, RestoreError::Version { found: 7, known: 1 }));
}

#[test]
fn the_context_id_can_be_read() {
    let guest = Guest::new();
    let vsock = guest.vsock.lock().unwrap();
    let mut bytes = [0xff; 8];
    vsock.config_read(0, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), 3);
    vsock.config_read(4, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    vsock.config_read(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

/// What a guest or a host end may do next.
#[derive(Debug, Clone)]
enum Deed {
    Packet { header: Header, data: usize, lie: bool },
    HostWrites(usize, usize),
    HostReads(usize),
    HostShuts(usize, bool),
    HostCloses(usize),
    HostConnects(u32),
    Refill,
    Drain,
}

fn deed() -> impl Strategy<Value = Deed> {
    let header = (0_u16..9, 0_u32..4, 0_u32..3, 0_u32..4, 0_u32..70_000, any::<u32>());
    prop_oneof![
        6 => (header, 0_usize..70_000, any::<bool>()).prop_map(
            |((op, guest, host, flags, buf_alloc, fwd_cnt), data, lie)| Deed::Packet {
                header: Header { flags, buf_alloc, fwd_cnt, ..Guest::header(op, guest, host) },
                data: if op == op::RW { data } else { 0 },
                lie: lie && data % 16 == 0,
            }
        ),
        2 => (any::<usize>(), 0_usize..100_000).prop_map(|(which, len)| Deed::HostWrites(which, len)),
        2 => any::<usize>().prop_map(Deed::HostReads),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, how)| Deed::HostShuts(which, how)),
        1 => any::<usize>().prop_map(Deed::HostCloses),
        1 => (0_u32..4).prop_map(Deed::HostConnects),
        3 => Just(Deed::Refill),
        2 => Just(Deed::Drain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever both sides do: no panic, no more kept than credit allows, and after a reset
    /// nothing is left.
    #[test]
    fn any_traffic_is_survived(deeds in prop::collection::vec(deed(), 1..120)) {
        let mut guest = Guest::new();
        for port in 0..2 {
            guest.vsock.lock().unwrap().listen(port, Listener::pairs());
        }
        let mut hosts: Vec<UnixStream> = Vec::new();
        for deed in deeds {
            let count = hosts.len().max(1);
            match deed {
                Deed::Packet { header, data, lie } if guest.tx.free() >= 4 => {
                    let len = u32::try_from(data + usize::from(lie)).unwrap();
                    guest.send(&Header { len, ..header }, &vec![7; data]);
                }
                Deed::HostWrites(which, len) => {
                    if let Some(host) = hosts.get_mut(which % count) {
                        let _ = host.write(&vec![1; len]);
                    }
                }
                Deed::HostReads(which) => {
                    if let Some(host) = hosts.get_mut(which % count) {
                        let _ = host.read(&mut [0; 100_000]);
                    }
                }
                Deed::HostShuts(which, write) => {
                    use std::net::Shutdown::{Read, Write};
                    if let Some(host) = hosts.get(which % count) {
                        let _ = host.shutdown(if write { Write } else { Read });
                    }
                }
                Deed::HostCloses(which) if !hosts.is_empty() => {
                    hosts.swap_remove(which % count);
                }
                Deed::HostConnects(port) => {
                    let _ = guest.vsock.lock().unwrap().connect(port, 1);
                }
                Deed::Refill => guest.refill(),
                Deed::Drain => while guest.receive().is_some() {},
                _ => {}
            }
            guest.run();
            while guest.tx.take().is_some() {}
            let mut accepted = guest.streams.accepted.lock().unwrap();
            for (_, stream) in accepted.drain(..) {
                stream.set_nonblocking(true).unwrap();
                hosts.push(stream);
            }
            drop(accepted);
            let vsock = guest.vsock.lock().unwrap();
            let most = vsock.counters().streams * u64::from(BUFFER);
            prop_assert!(u64::try_from(vsock.unsent()).unwrap() <= most);
        }
        guest.vsock.lock().unwrap().reset();
        hosts.clear();
        guest.streams.connected.lock().unwrap().clear();
        guest.run();
        prop_assert_eq!(guest.streams(), 0);
    }
}
