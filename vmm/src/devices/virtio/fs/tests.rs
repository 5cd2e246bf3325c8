//! The device between a guest's driver and a file server that may be slow, dead or mad.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Fs, FsError};
use crate::devices::virtio::state::{RestoreError, SaveError};
use crate::devices::virtio::testing::{DriverQueue, logger};
use crate::devices::virtio::{Activation, VirtioDevice};
use crate::vm::GuestMemory;

const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x40_0000;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const READ: u32 = 15;
const WRITE: u32 = 16;

struct Guest {
    memory: Arc<GuestMemory>,
    priority: DriverQueue,
    queue: DriverQueue,
    kicks: Vec<EventFd>,
    fs: Arc<Mutex<Fs>>,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    servers: Vec<UnixStream>,
}

impl Guest {
    fn new(channels: usize) -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x80_0000)]).unwrap());
        let (ours, servers): (Vec<_>, Vec<_>) = (0..channels)
            .map(|_| UnixStream::pair().map(|(ours, theirs)| (ours.into(), theirs)).unwrap())
            .unzip();
        for server in &servers {
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        let fs = Arc::new(Mutex::new(Fs::new("husk", ours, logger()).unwrap()));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().unwrap();
        manager.add_subscriber(fs.clone());
        let priority = DriverQueue::new(&memory, 0, 64);
        let queue = DriverQueue::new(&memory, 0x1_0000, 512);
        let kicks = Vec::new();
        let mut guest = Self { memory, priority, queue, kicks, fs, manager, servers };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.memory.write_slice(&[0; 0x4_0000], GuestAddress(0)).unwrap();
        self.priority = DriverQueue::new(&self.memory, 0, 64);
        self.queue = DriverQueue::new(&self.memory, 0x1_0000, 512);
        let queues = vec![self.priority.activate(), self.queue.activate()];
        self.kicks = queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let activation = Activation { memory: (*self.memory).clone().into(), features: 0, queues };
        self.fs.lock().unwrap().activate(activation).unwrap();
        self.run();
    }

    fn run(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }

    fn kick(&mut self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
        self.run();
    }

    /// Runs the event loop until an answer comes.
    fn answer(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.queue.take() {
                return used;
            }
            assert!(Instant::now() < deadline, "no answer");
            self.manager.run_with_timeout(10).unwrap();
        }
    }

    /// Offers a request with its body split in two, and room for an answer in two pieces.
    fn ask(&mut self, opcode: u32, unique: u64, body: &[u8], room: u32) -> u16 {
        // Each request in flight has its own megabyte, wrapping.
        let at = REQUEST + (unique % 2) * 0x18_0000;
        let bytes = request(opcode, unique, body);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let half = len - (len - 40) / 2;
        let out = answer_at(unique);
        let head = self.queue.offer(
            &[(at, 40), (at + 40, half - 40), (at + u64::from(half), len - half)],
            &[(out, 10), (out + 10, room - 10)],
        );
        self.kick(1);
        head
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn error(&self, unique: u64) -> i32 {
        let bytes = self.read(answer_at(unique), 16);
        assert_eq!(bytes[0..4], 16_u32.to_ne_bytes());
        assert_eq!(bytes[8..16], unique.to_ne_bytes());
        i32::from_ne_bytes(bytes[4..8].try_into().unwrap())
    }
}

fn answer_at(unique: u64) -> u64 {
    ANSWER + (unique % 2) * 0x18_0000
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[0..4].copy_from_slice(&u32::try_from(40 + body.len()).unwrap().to_ne_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn response(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[0..4].copy_from_slice(&u32::try_from(16 + body.len()).unwrap().to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Reads one framed request, `chunk` bytes at a time.
fn receive(mut server: &UnixStream, chunk: usize) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    server.read_exact(&mut bytes).unwrap();
    let len = usize::try_from(u32::from_ne_bytes(bytes[..].try_into().unwrap())).unwrap();
    while bytes.len() < len {
        let mut piece = vec![0; chunk.min(len - bytes.len())];
        let count = server.read(&mut piece).unwrap();
        assert_ne!(count, 0);
        bytes.extend_from_slice(&piece[..count]);
    }
    bytes
}

fn is_silent(mut server: &UnixStream) -> bool {
    server.set_nonblocking(true).unwrap();
    let result = server.read(&mut [0]);
    server.set_nonblocking(false).unwrap();
    matches!(result, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn a_request_goes_out_whole_and_its_answer_comes_back() {
    let mut guest = Guest::new(1);
    let head = guest.ask(LOOKUP, 4, b"some-name\0", 200);
    assert_eq!(receive(&guest.servers[0], 100), request(LOOKUP, 4, b"some-name\0"));
    assert_eq!(guest.fs.lock().unwrap().save(), Err(SaveError::Busy(1)));
    guest.servers[0].write_all(&response(4, b"an entry")).unwrap();
    assert_eq!(guest.answer(), (head, 24));
    assert_eq!(guest.read(ANSWER, 24), response(4, b"an entry"));
    assert_eq!(guest.queue.interrupt.take(), 1);
    assert_eq!(guest.priority.interrupt.take(), 0);
    assert_eq!(guest.fs.lock().unwrap().requests(), 1);
}

#[test]
fn a_megabyte_each_way_in_small_pieces() {
    const MEGABYTE: usize = 1 << 20;
    let mut guest = Guest::new(1);
    let data: Vec<u8> = (0..MEGABYTE + 40).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    let expected = request(WRITE, 2, &data);
    let server = guest.servers[0].try_clone().unwrap();
    let copy = data.clone();
    let thread = std::thread::spawn(move || {
        let got = receive(&server, 5000);
        assert!(got == expected);
        (&server).write_all(&response(2, &[0; 8])).unwrap();
        receive(&server, 100);
        let answer = response(3, &copy[..MEGABYTE]);
        (&server).write_all(&answer[..7]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        for piece in answer[7..].chunks(70_001) {
            (&server).write_all(piece).unwrap();
        }
    });
    let head = guest.ask(WRITE, 2, &data, 24);
    assert_eq!(guest.answer(), (head, 24));
    let room = u32::try_from(MEGABYTE + 16).unwrap();
    let head = guest.ask(READ, 3, &[0; 40], room);
    assert_eq!(guest.answer(), (head, room));
    let got = guest.read(answer_at(3), MEGABYTE + 16);
    assert!(got == response(3, &data[..MEGABYTE]));
    thread.join().unwrap();
}

#[test]
fn what_has_no_answer_is_done_when_it_is_sent() {
    let mut guest = Guest::new(1);
    for unique in 0..3_u64 {
        let at = REQUEST + unique * 0x1000;
        guest.memory.write_slice(&request(FORGET, unique, &[1; 8]), GuestAddress(at)).unwrap();
        guest.priority.offer(&[(at, 48)], &[]);
    }
    guest.kick(0);
    for unique in 0..3 {
        assert_eq!(guest.priority.take().unwrap().1, 0);
        assert_eq!(receive(&guest.servers[0], 100), request(FORGET, unique, &[1; 8]));
    }
    assert_eq!(guest.priority.interrupt.take(), 1);
    guest.fs.lock().unwrap().save().unwrap();
}

#[test]
fn requests_wait_for_channels_and_urgent_ones_go_first() {
    let mut guest = Guest::new(2);
    let heads: Vec<u16> = (0..4).map(|unique| guest.ask(LOOKUP, unique, b"x\0", 100)).collect();
    let at = REQUEST + 0x9000;
    guest.memory.write_slice(&request(FORGET, 9, &[1; 8]), GuestAddress(at)).unwrap();
    guest.priority.offer(&[(at, 48)], &[]);
    guest.kick(0);
    assert!(guest.priority.take().is_none());
    // Requests 2 and 3 have overwritten 0 and 1 in guest memory, but those were sent before.
    assert_eq!(receive(&guest.servers[0], 100)[8], 0);
    assert_eq!(receive(&guest.servers[1], 100)[8], 1);
    assert!(is_silent(&guest.servers[0]) && is_silent(&guest.servers[1]));
    guest.servers[1].write_all(&response(1, b"")).unwrap();
    assert_eq!(guest.answer(), (heads[1], 16));
    assert!(guest.priority.take().is_some());
    assert_eq!(receive(&guest.servers[1], 100)[8], 9);
    assert_eq!(receive(&guest.servers[1], 100)[8], 2);
    guest.servers[0].write_all(&response(0, b"")).unwrap();
    assert_eq!(guest.answer(), (heads[0], 16));
    assert_eq!(receive(&guest.servers[0], 100)[8], 3);
    guest.servers[1].write_all(&response(2, b"")).unwrap();
    guest.servers[0].write_all(&response(3, b"")).unwrap();
    guest.answer();
    guest.answer();
    guest.fs.lock().unwrap().save().unwrap();
}

#[test]
fn a_dead_file_server_is_an_error_and_not_the_end() {
    let mut guest = Guest::new(2);
    guest.ask(LOOKUP, 0, b"x\0", 100);
    receive(&guest.servers[0], 100);
    drop(guest.servers.remove(0));
    guest.answer();
    assert_eq!(guest.error(0), -libc::EIO);
    let head = guest.ask(LOOKUP, 1, b"y\0", 100);
    receive(&guest.servers[0], 100);
    guest.servers[0].write_all(&response(1, b"")).unwrap();
    assert_eq!(guest.answer(), (head, 16));
    drop(guest.servers.remove(0));
    guest.run();
    for unique in 0..200 {
        guest.ask(LOOKUP, unique, b"z\0", 100);
        guest.answer();
        assert_eq!(guest.error(unique), -libc::ENOTCONN);
    }
    guest.memory.write_slice(&request(FORGET, 9, &[1; 8]), GuestAddress(REQUEST)).unwrap();
    guest.priority.offer(&[(REQUEST, 48)], &[]);
    guest.kick(0);
    assert_eq!(guest.priority.take().unwrap().1, 0);
}

#[test]
fn answers_out_of_frame_are_not_believed() {
    let wrong_number = response(5, b"entry");
    let mut too_long = response(4, b"");
    too_long[0..4].copy_from_slice(&101_u32.to_ne_bytes());
    let mut too_short = response(4, b"");
    too_short[0..4].copy_from_slice(&15_u32.to_ne_bytes());
    let mut two = response(4, b"");
    two.extend(response(4, b""));
    for bad in [wrong_number, too_long, too_short, two] {
        let mut guest = Guest::new(1);
        guest.ask(LOOKUP, 4, b"x\0", 100);
        guest.servers[0].write_all(&bad).unwrap();
        assert_eq!(guest.answer().1, 16);
        assert_eq!(guest.error(4), -libc::EIO);
        receive(&guest.servers[0], 100);
        assert_eq!(guest.servers[0].read(&mut [0]).unwrap(), 0, "the channel is closed");
    }
}

#[test]
fn requests_out_of_frame_never_leave() {
    let mut guest = Guest::new(1);
    let write = |guest: &Guest, bytes: &[u8]| {
        guest.memory.write_slice(bytes, GuestAddress(REQUEST)).unwrap();
    };
    let mut bytes = request(LOOKUP, 6, b"name\0");
    bytes[0] += 1;
    write(&guest, &bytes);
    for (readable, writable) in [
        (vec![(REQUEST, 45)], vec![(ANSWER, 100)]),
        (vec![(REQUEST, 39)], vec![(ANSWER, 100)]),
        (vec![], vec![(ANSWER, 100)]),
    ] {
        guest.queue.offer(&readable, &writable);
        guest.kick(1);
        assert_eq!(guest.answer().1, 16);
    }
    bytes[0] -= 1;
    write(&guest, &bytes);
    for (readable, writable) in [
        (vec![(REQUEST, 45)], vec![(ANSWER, 15)]),
        (vec![(REQUEST, 45)], vec![]),
        (vec![(REQUEST, 45)], vec![(ANSWER, 1 << 21)]),
        (vec![(REQUEST, 1 << 21)], vec![(ANSWER, 100)]),
        (vec![(u64::MAX, 45)], vec![(ANSWER, 100)]),
    ] {
        guest.queue.offer(&readable, &writable);
        guest.kick(1);
        assert_eq!(guest.answer().1, 0);
    }
    guest.queue.publish(600);
    guest.kick(1);
    assert!(is_silent(&guest.servers[0]));
    guest.ask(LOOKUP, 6, b"name\0", 100);
    receive(&guest.servers[0], 100);
}

#[test]
fn after_a_reset_old_answers_are_thrown_away() {
    let mut guest = Guest::new(1);
    guest.ask(LOOKUP, 4, b"x\0", 1000);
    receive(&guest.servers[0], 100);
    let answer = response(4, &[7; 900]);
    guest.servers[0].write_all(&answer[..300]).unwrap();
    guest.run();
    guest.fs.lock().unwrap().reset();
    guest.run();
    guest.memory.write_slice(&[0; 1000], GuestAddress(ANSWER)).unwrap();
    guest.activate();
    let head = guest.ask(LOOKUP, 7, b"y\0", 100);
    guest.servers[0].write_all(&answer[300..]).unwrap();
    guest.run();
    assert_eq!(guest.read(ANSWER, 1000), [0; 1000]);
    assert!(guest.queue.take().is_none());
    assert_eq!(receive(&guest.servers[0], 100)[8], 7);
    guest.servers[0].write_all(&response(7, b"")).unwrap();
    assert_eq!(guest.answer(), (head, 16));
}

#[test]
fn state_and_configuration() {
    let guest = Guest::new(1);
    let mut fs = guest.fs.lock().unwrap();
    let mut config = [0xff; 48];
    fs.config_read(0, &mut config);
    assert_eq!(&config[..5], b"husk\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let text = serde_json::to_string(&fs.save().unwrap()).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    fs.restore(&state).unwrap();
    let text = text.replace("\"version\":1", "\"version\":3");
    let newer = serde_json::from_str(&text).unwrap();
    assert!(matches!(fs.restore(&newer), Err(RestoreError::Version { found: 3, known: 1 })));
    let (channel, _other) = UnixStream::pair().unwrap();
    let mut other = Fs::new("other", vec![channel.into()], logger()).unwrap();
    assert!(matches!(other.restore(&state), Err(RestoreError::Mismatch(_))));
    assert!(matches!(Fs::new("", vec![], logger()), Err(FsError::Tag)));
    assert!(matches!(Fs::new(&"x".repeat(37), vec![], logger()), Err(FsError::Tag)));
    assert!(matches!(Fs::new("x", vec![], logger()), Err(FsError::Channels)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the guest asks and the file server answers: every request is given back once, and
    /// nothing is written past its room.
    #[test]
    fn any_traffic_is_survived(
        requests in prop::collection::vec(
            (0_u32..50, 0_u32..4, 0_u32..200, 0_u32..300, any::<bool>()), 1..40),
        answers in prop::collection::vec((0_u32..320, 0_u64..40, 0_usize..300), 0..40),
    ) {
        let mut guest = Guest::new(2);
        let mut answers = answers.into_iter();
        let mut given_back = 0;
        for (number, (opcode, lie, body, room, priority)) in (0_u64..).zip(requests.clone()) {
            let (at, out) = (REQUEST + number * 0x1000, ANSWER + number * 0x1000);
            let mut bytes = request(opcode, number, &vec![1; usize::try_from(body).unwrap()]);
            bytes[0] = bytes[0].wrapping_add(u8::from(lie == 0));
            guest.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
            guest.memory.write_slice(&[0xee; 0x1000], GuestAddress(out)).unwrap();
            let queue = if priority { &mut guest.priority } else { &mut guest.queue };
            queue.offer(&[(at, 40 + body)], &[(out, room)]);
            guest.kick(usize::from(!priority));
            if let Some((len, unique, count)) = answers.next() {
                let mut answer = response(unique, &vec![2; count]);
                answer[0..4].copy_from_slice(&len.to_ne_bytes());
                let server = usize::try_from(unique % 2).unwrap();
                let _ = guest.servers[server].write_all(&answer);
            }
            guest.run();
        }
        guest.servers.clear();
        guest.run();
        while let Some((_, len)) = guest.queue.take().or_else(|| guest.priority.take()) {
            prop_assert!(len <= 300);
            given_back += 1;
        }
        prop_assert_eq!(given_back, requests.len());
        for (number, (_, _, _, room, _)) in (0_u64..).zip(requests) {
            let past = ANSWER + number * 0x1000 + u64::from(room);
            prop_assert_eq!(guest.read(past, 64), [0xee; 64]);
        }
    }
}
