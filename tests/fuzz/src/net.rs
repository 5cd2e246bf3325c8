//! The network device: everything a guest can write, and frames from outside between it.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_vmm::devices::virtio::net::{Net, NetConfig, Tap};
use husk_vmm::devices::virtio::{Activation, VirtioDevice};
use husk_vmm::vm::GuestMemory;
use slog::{Discard, Logger, o};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::parts::{self, SIZE};

const MEMORY: usize = 0x4_0000;
const PAIRS: usize = 2;
const VERSION_1: u64 = 1 << 32;
/// Turns of the event loop after one step. A device that always has more to do would never rest; a
/// queue of 16 entries is done within a few.
const TURNS: usize = 64;

struct Guest {
    memory: GuestMemory,
    net: Arc<Mutex<Net>>,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    wires: Vec<UnixDatagram>,
    features: u64,
    kicks: Vec<EventFd>,
    available: [u16; 2 * PAIRS + 1],
}

fn base(queue: usize) -> u64 {
    0x1000 * queue as u64
}

impl Guest {
    fn new(features: u64) -> Self {
        let (taps, wires) = (0..PAIRS)
            .map(|_| {
                let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
                theirs.set_nonblocking(true).expect("a flag");
                (Tap::stand_in(ours.into()).expect("a stand-in"), theirs)
            })
            .unzip();
        let config = NetConfig {
            taps: Vec::new(),
            vhost: Vec::new(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            receive_limit: None,
            send_limit: None,
        };
        let logger = Logger::root(Discard, o!());
        let net = Arc::new(Mutex::new(Net::over(taps, config, logger).expect("a device")));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().expect("an event loop");
        manager.add_subscriber(net.clone());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let features = features & net.lock().expect("a lock").features() | VERSION_1;
        let available = [0; 2 * PAIRS + 1];
        Self { memory, net, manager, wires, features, kicks: Vec::new(), available }
    }

    fn activate(&mut self) {
        let mut net = self.net.lock().expect("a lock");
        net.reset();
        self.available = [0; 2 * PAIRS + 1];
        self.kicks.clear();
        let mut queues = Vec::new();
        for index in 0..net.queues_needed(self.features) {
            self.memory.write_slice(&[0; 0x1000], GuestAddress(base(index))).expect("memory");
            let (mut active, kick) = parts::queue(base(index));
            active.queue.set_event_idx(self.features & 1 << 29 != 0);
            self.kicks.push(kick);
            queues.push(active);
        }
        let activation =
            Activation { memory: self.memory.clone().into(), features: self.features, queues };
        net.activate(activation).expect("an active device");
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.byte();
        let queue = usize::from(input.byte()) % self.kicks.len();
        match step % 8 {
            // A descriptor.
            0 | 1 => {
                let at = base(queue) + 16 * u64::from(input.byte() % 18);
                // Addresses up to a bit behind memory, and a few far away.
                let address = u64::from(input.word()) << 2 | u64::from(step >> 6) << 62;
                let len = u32::from(input.word()) << (u32::from(step >> 3 & 3) * 8);
                let (flags, next) = (u16::from(input.byte() % 8), u16::from(input.byte() % 20));
                let _ = self.memory.write_obj(address, GuestAddress(at));
                let _ = self.memory.write_obj(len, GuestAddress(at + 8));
                let _ = self.memory.write_obj(flags, GuestAddress(at + 12));
                let _ = self.memory.write_obj(next, GuestAddress(at + 14));
            }
            // A chain.
            2 | 3 => {
                let index = self.available[queue];
                let entry = base(queue) + 0x404 + 2 * u64::from(index % SIZE);
                let head = u16::from(input.byte() % 20);
                let _ = self.memory.write_obj(head, GuestAddress(entry));
                self.available[queue] = index.wrapping_add(1);
                let index = base(queue) + 0x402;
                let _ = self.memory.write_obj(self.available[queue], GuestAddress(index));
            }
            4 => {
                let _ = self.kicks[queue].write(1);
            }
            // Anything anywhere: headers, commands, indirect tables, the rings' own words.
            5 => {
                let at = u64::from(input.word()) << 2;
                for offset in 0..u64::from(step >> 3) {
                    let _ = self.memory.write_obj(input.byte(), GuestAddress(at + offset));
                }
            }
            6 => {
                let len = usize::from(input.word());
                let _ = self.wires[queue % PAIRS].send(&vec![step; len]);
            }
            _ if step >> 3 == 0 => self.activate(),
            _ => {
                let mut net = self.net.lock().expect("a lock");
                let _ = net.set_link(step & 8 != 0);
                let _ = net.positions();
                net.config_write(u64::from(input.byte()), &[step]);
            }
        }
        self.turn();
    }

    fn turn(&mut self) {
        let mut bytes = [0; 1 << 17];
        for _ in 0..TURNS {
            let events = self.manager.run_with_timeout(0).expect("the event loop");
            let mut heard = false;
            for wire in &self.wires {
                while wire.recv(&mut bytes).is_ok() {
                    heard = true;
                }
            }
            if events == 0 && !heard {
                return;
            }
        }
        panic!("the device does not rest");
    }
}

/// One guest's life.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let features = match input.byte() {
        byte if byte & 1 == 0 => u64::MAX,
        byte => !(u64::from(byte) << 15),
    };
    let mut guest = Guest::new(features);
    guest.activate();
    while !input.is_empty() {
        guest.step(&mut input);
    }
}
