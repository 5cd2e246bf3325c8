//! The socket device's streams: packets whose headers are nearly right, and host ends that do what they
//! like.
//!
//! The guest is never sent more than it said it has room for, and the device keeps no more of the
//! guest's than it promised to.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_vmm::devices::virtio::vsock::{BUFFER, Listener, Vsock};
use husk_vmm::devices::virtio::{Activation, VirtioDevice};
use husk_vmm::vm::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::parts::{self, SIZE, Streams};

const MEMORY: usize = 0x6_0000;
/// Where packets are received, and where they are sent from.
const RECEIVED: u64 = 0x1_0000;
const SENT: u64 = 0x3_0000;
const SLOT: u64 = 0x1000;
const WRITE: u16 = 2;
const TURNS: usize = 512;

const HEADER: u64 = 44;
const GUEST: u64 = 3;
const HOST: u64 = 2;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const DATA: u16 = 5;

/// What the guest knows of a stream, by its own port and the host's.
#[derive(Default)]
struct Known {
    buffer: u32,
    consumed: u32,
    received: u32,
    /// The most that the host may have sent by what it was ever told.
    allowed: u32,
    /// It has begun, and the guest has done nothing to end it.
    sure: bool,
}

struct Guest {
    memory: GuestMemory,
    vsock: Arc<Mutex<Vsock>>,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    streams: Streams,
    kicks: Vec<EventFd>,
    /// Of each queue: what was offered, and what of that came back.
    offered: [u16; 3],
    used: [u16; 3],
    known: HashMap<(u32, u32), Known>,
}

fn base(queue: usize) -> u64 {
    0x1000 * queue as u64
}

impl Guest {
    fn new() -> Self {
        let streams = Streams::default();
        let vsock = Arc::new(Mutex::new(parts::vsock(streams.clone())));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().expect("an event loop");
        manager.add_subscriber(vsock.clone());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        Self {
            memory,
            vsock,
            manager,
            streams,
            kicks: Vec::new(),
            offered: [0; 3],
            used: [0; 3],
            known: HashMap::new(),
        }
    }

    fn activate(&mut self) {
        let mut vsock = self.vsock.lock().expect("a lock");
        vsock.reset();
        self.kicks.clear();
        self.known.clear();
        (self.offered, self.used) = ([0; 3], [0; 3]);
        let queues = (0..3).map(|number| {
            let base = base(number);
            self.memory.write_slice(&[0; 0x1000], GuestAddress(base)).expect("memory");
            let (queue, kick) = parts::queue(base);
            self.kicks.push(kick);
            queue
        });
        let queues = queues.collect();
        let activation =
            Activation { memory: self.memory.clone().into(), features: 1 << 32, queues };
        vsock.activate(activation).expect("an active device");
        vsock.listen(1024, Listener::pairs());
        let (ours, _) = UnixStream::pair().expect("a pair");
        vsock.listen(1025, Listener::over(ours.into(), Some(7)));
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).expect("memory");
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).expect("memory")
    }

    /// Offers one descriptor; false if the ring is full.
    fn offer(&mut self, queue: usize, area: u64, length: u32, flags: u16) -> bool {
        let index = self.offered[queue];
        if index.wrapping_sub(self.used[queue]) >= SIZE {
            return false;
        }
        let slot = index % SIZE;
        let at = base(queue) + 16 * u64::from(slot);
        self.write(area + SLOT * u64::from(slot), at);
        self.write(length, at + 8);
        self.write(u32::from(flags), at + 12);
        self.write(slot, base(queue) + 0x404 + 2 * u64::from(slot));
        self.offered[queue] = index.wrapping_add(1);
        self.write(self.offered[queue], base(queue) + 0x402);
        self.kicks[queue].write(1).expect("an eventfd");
        true
    }

    /// A packet of the guest's. Its credit is nearly what the guest has.
    fn packet(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let op = u16::from(choice % 9);
        let ports = self.ports(input);
        let there = if op == DATA { u32::from(input.word()) % 4000 } else { 0 };
        let known = self.known.entry(ports).or_default();
        match choice >> 6 {
            0 => known.buffer = u32::from(input.word()),
            1 => known.buffer = 1 << 16,
            2 => known.consumed = known.received,
            _ => known.consumed += u32::from(input.byte()),
        }
        known.allowed = known.allowed.max(known.consumed + known.buffer);
        known.sure &= op != REQUEST && op != RESET;
        let length = if input.byte() == 0 { input.long() } else { there };
        let kind = if input.byte() == 0 { input.word() } else { STREAM };
        let mut header = [GUEST, HOST].map(u64::to_le_bytes).concat();
        header.extend([ports.0, ports.1, length].map(u32::to_le_bytes).concat());
        header.extend([kind, op].map(u16::to_le_bytes).concat());
        let flags = u32::from(input.byte() % 8);
        header.extend([flags, known.buffer, known.consumed].map(u32::to_le_bytes).concat());
        let at = SENT + SLOT * u64::from(self.offered[1] % SIZE);
        let whole = u32::try_from(header.len()).expect("small") + there;
        if self.offer(1, SENT, whole, 0) {
            // The queue is looked at only in `turn`.
            self.memory.write_slice(&header, GuestAddress(at)).expect("memory");
        }
    }

    /// Those of a stream there is, or others.
    fn ports(&self, input: &mut Input<'_>) -> (u32, u32) {
        let choice = input.byte();
        let mut streams: Vec<_> = self.known.keys().copied().collect();
        streams.sort_unstable();
        match streams.get(usize::from(choice) % (streams.len() + 2)) {
            Some(ports) => *ports,
            None => (u32::from(choice % 4), 1024 + u32::from(choice >> 6)),
        }
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let mut streams = self.streams.0.lock().expect("a lock");
        if choice.is_multiple_of(8) {
            drop(streams);
            let mut vsock = self.vsock.lock().expect("a lock");
            let _ = vsock.connect(u32::from(input.byte() % 4), input.long().into());
            return;
        }
        let count = streams.len().max(1);
        let Some(stream) = streams.get_mut(usize::from(input.byte()) % count) else { return };
        match choice % 8 {
            1..=3 => {
                let _ = stream.write(&vec![choice; usize::from(input.word())]);
            }
            4 => {
                let _ = stream.read(&mut vec![0; usize::from(input.word())]);
            }
            5 => {
                let _ = stream.shutdown(Shutdown::Write);
            }
            6 => {
                let _ = stream.shutdown(Shutdown::Read);
            }
            _ => {
                streams.remove(usize::from(choice >> 3) % count);
            }
        }
    }

    fn turn(&mut self) {
        for _ in 0..TURNS {
            let events = self.manager.run_with_timeout(0).expect("the event loop");
            self.take();
            if events == 0 {
                let vsock = self.vsock.lock().expect("a lock");
                let most = vsock.counters().streams * u64::from(BUFFER);
                assert!(vsock.unsent() as u64 <= most, "more is kept than was promised");
                return;
            }
        }
        panic!("the device does not rest");
    }

    /// Looks at what came back.
    fn take(&mut self) {
        for queue in 0..2 {
            let used: u16 = self.read(base(queue) + 0x802);
            while self.used[queue] != used {
                let entry = base(queue) + 0x804 + 8 * u64::from(self.used[queue] % SIZE);
                let (head, length) = (self.read::<u32>(entry), self.read::<u32>(entry + 4));
                self.used[queue] = self.used[queue].wrapping_add(1);
                if queue == 0 && length > 0 {
                    self.hear(RECEIVED + SLOT * u64::from(head), length.into());
                }
            }
        }
    }

    /// A packet of the host's.
    fn hear(&mut self, at: u64, length: u64) {
        assert!(length >= HEADER);
        let said = u64::from(self.read::<u32>(at + 24));
        assert_eq!(length, HEADER + said, "a packet that is not whole");
        assert_eq!((self.read::<u64>(at), self.read::<u64>(at + 8)), (HOST, GUEST));
        let ports = (self.read::<u32>(at + 20), self.read::<u32>(at + 16));
        match self.read::<u16>(at + 30) {
            DATA => {
                let known = self.known.entry(ports).or_default();
                known.received += u32::try_from(said).expect("small");
                assert!(!known.sure || known.received <= known.allowed, "no room for that");
            }
            // The counters of a stream begin with it.
            REQUEST | RESPONSE => {
                let known = self.known.entry(ports).or_default();
                (known.received, known.sure) = (0, true);
            }
            RESET => self.known.entry(ports).or_default().sure = false,
            _ => assert_eq!(said, 0),
        }
    }
}

/// One guest's streams.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut guest = Guest::new();
    guest.activate();
    while !input.is_empty() {
        match input.byte() % 16 {
            0..=6 => guest.packet(&mut input),
            7..=9 => {
                let length = u32::from(input.word()) % 0x1000;
                while guest.offer(0, RECEIVED, length.max(64), WRITE) {}
            }
            15 if input.byte() == 0 => guest.activate(),
            _ => guest.host(&mut input),
        }
        guest.turn();
    }
}
