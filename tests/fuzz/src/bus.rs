//! The PCI bus with a device of each kind behind it, as a hostile kernel sees it: configuration ports,
//! registers of the transport, queues anywhere in memory.
//!
//! Random bytes alone never get a device to run, so there is a step that sets one up as a driver would;
//! what comes before, between and after it is the input's.

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_vmm::bus::BusDevice;
use husk_vmm::bus::pci::{ConfigPorts, PciBus};
use husk_vmm::devices::virtio::VirtioDevice;
use husk_vmm::devices::virtio::mem::Mem;
use husk_vmm::devices::virtio::transport::pci::{BAR_SIZE, VirtioPci, layout};
use husk_vmm::devices::virtio::vsock::{Listener, Vsock};
use husk_vmm::vm::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;
use crate::parts::{self, Streams, Wires};

const MEMORY: usize = 0x4_0000;
const WINDOW: u64 = 0xc000_0000;
const WINDOW_SIZE: u64 = 0x10_0000;
const SIZE: u16 = 16;
const DEVICES: usize = 5;
/// Turns of the event loop after one step: a device that always has more to do would never rest.
const TURNS: usize = 256;

/// Registers of the common configuration (virtio 1.2, section 4.1.4.3).
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

struct Guest {
    memory: GuestMemory,
    wires: Arc<Wires>,
    bus: Arc<PciBus>,
    ports: ConfigPorts,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    bars: [u64; DEVICES],
    queues: [usize; DEVICES],
    vsock: Arc<Mutex<Vsock>>,
    mem: Arc<Mutex<Mem>>,
    streams: Streams,
    /// The file server's ends of the channels.
    files: Vec<UnixStream>,
    wire: UnixDatagram,
    available: [[u16; 8]; DEVICES],
}

/// Where the step that sets a device up puts its queues.
fn base(device: usize, queue: usize) -> u64 {
    0x1000 * (8 * device + queue) as u64 % MEMORY as u64
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let bus = Arc::new(PciBus::new(WINDOW, WINDOW_SIZE).expect("a bus"));
        let streams = Streams::default();
        let vsock = Arc::new(Mutex::new(parts::vsock(streams.clone())));
        vsock.lock().expect("a lock").listen(1024, Listener::pairs());
        let (fs, files) = parts::fs();
        let mem = Arc::new(Mutex::new(parts::mem(&memory)));
        let (net, wire) = parts::net();
        let mut guest = Self {
            memory,
            wires: Arc::default(),
            ports: ConfigPorts::new(Arc::clone(&bus)),
            bus,
            manager: EventManager::new().expect("an event loop"),
            bars: [0; DEVICES],
            queues: [0; DEVICES],
            vsock: Arc::clone(&vsock),
            mem: Arc::clone(&mem),
            streams,
            files,
            wire,
            available: [[0; 8]; DEVICES],
        };
        guest.plug(0, Arc::new(Mutex::new(parts::rng())));
        guest.plug(1, vsock);
        guest.plug(2, Arc::new(Mutex::new(fs)));
        guest.plug(3, mem);
        guest.plug(4, Arc::new(Mutex::new(net)));
        guest
    }

    fn plug<D>(&mut self, index: usize, device: Arc<Mutex<D>>)
    where
        D: VirtioDevice + MutEventSubscriber + Send + 'static,
    {
        self.bars[index] = self.bus.allocate(BAR_SIZE).expect("an address");
        self.queues[index] = device.lock().expect("a lock").queue_sizes().len();
        let function = VirtioPci::new(
            device.clone(),
            self.memory.clone(),
            self.wires.clone(),
            self.bars[index],
            parts::logger(),
        );
        self.bus.add(Arc::new(Mutex::new(function.expect("a function")))).expect("a slot");
        self.manager.add_subscriber(device);
    }

    fn set(&self, device: usize, register: u64, data: &[u8]) {
        self.bus.memory_write(self.bars[device] + layout::COMMON + register, data);
    }

    /// What a driver does, with all features offered but those that the input takes away.
    fn set_up(&mut self, device: usize, without: u32) {
        self.available[device] = [0; 8];
        for status in [0_u8, 1, 3] {
            self.set(device, STATUS, &[status]);
        }
        for (half, features) in [(0_u32, !without), (1, 1)] {
            self.set(device, DRIVER_FEATURE_SELECT, &half.to_le_bytes());
            let mut offered = [0; 4];
            self.set(device, 0, &half.to_le_bytes());
            self.bus.memory_read(self.bars[device] + layout::COMMON + 4, &mut offered);
            let features = features & u32::from_le_bytes(offered);
            self.set(device, DRIVER_FEATURE, &features.to_le_bytes());
        }
        self.set(device, STATUS, &[11]);
        for queue in 0..self.queues[device].min(8) {
            let at = base(device, queue);
            let _ = self.memory.write_slice(&[0; 0x1000], GuestAddress(at));
            let number = u16::try_from(queue).unwrap_or(0);
            self.set(device, QUEUE_SELECT, &number.to_le_bytes());
            self.set(device, QUEUE_SIZE, &SIZE.to_le_bytes());
            for (register, offset) in
                [(QUEUE_DESC, 0), (QUEUE_DRIVER, 0x400), (QUEUE_DEVICE, 0x800)]
            {
                self.set(device, register, &u32::try_from(at + offset).unwrap_or(0).to_le_bytes());
                self.set(device, register + 4, &[0; 4]);
            }
            self.set(device, QUEUE_ENABLE, &1_u16.to_le_bytes());
        }
        self.set(device, STATUS, &[15]);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.byte();
        let device = usize::from(input.byte()) % DEVICES;
        let queue = usize::from(step >> 4) % self.queues[device].clamp(1, 8);
        match step % 16 {
            0 => self.set_up(device, input.long() & !(1 << 29)),
            // The configuration ports, whole and in part.
            1 => {
                let address = input.long() | u32::from(step & 0x10) << 27;
                self.ports.write(0, &address.to_le_bytes());
            }
            2 => {
                let data = input.long().to_le_bytes();
                let length = 1 << (step >> 4 & 3).min(2);
                self.ports.write(u64::from(4 + (step >> 6)), &data[..length]);
            }
            3 => {
                let mut data = [0; 8];
                let length = usize::from(step >> 4 & 7) + 1;
                self.ports.read(u64::from(input.byte() & 7), &mut data[..length]);
            }
            // The transport's registers, whole and in part.
            4 | 5 => {
                let at = self.bars[device] + u64::from(input.word()) % (BAR_SIZE + 16);
                let data = [input.long().to_le_bytes(), input.long().to_le_bytes()].concat();
                let length = 1 << (step >> 5 & 3);
                self.bus.memory_write(at, &data[..length]);
                self.wires.write(at);
            }
            6 => {
                let at = self.bars[device] + u64::from(input.word()) % (BAR_SIZE + 16);
                let mut data = [0; 8];
                self.bus.memory_read(at, &mut data[..usize::from(step >> 5) + 1]);
            }
            // The common configuration alone.
            7 => {
                let register = u64::from(input.byte()) % layout::COMMON_SIZE;
                let data = input.long().to_le_bytes();
                self.set(device, register, &data[..1 << (step >> 5 & 3).min(2)]);
            }
            // A descriptor.
            8 | 9 => {
                let at = base(device, queue) + 16 * u64::from(input.byte() % 18);
                let address = u64::from(input.word()) << 2 | u64::from(step >> 6) << 62;
                let length = u32::from(input.word()) << (u32::from(input.byte() & 3) * 8);
                let (flags, next) = (u16::from(input.byte() % 8), u16::from(input.byte() % 20));
                let _ = self.memory.write_obj(address, GuestAddress(at));
                let _ = self.memory.write_obj(length, GuestAddress(at + 8));
                let _ = self.memory.write_obj(flags, GuestAddress(at + 12));
                let _ = self.memory.write_obj(next, GuestAddress(at + 14));
            }
            // A chain, and a notification of it.
            10 | 11 => {
                let index = self.available[device][queue];
                let ring = base(device, queue) + 0x400;
                let head = u16::from(input.byte() % 20);
                let entry = ring + 4 + 2 * u64::from(index % SIZE);
                let _ = self.memory.write_obj(head, GuestAddress(entry));
                let index = index.wrapping_add(1);
                self.available[device][queue] = index;
                let _ = self.memory.write_obj(index, GuestAddress(ring + 2));
                self.wires.write(
                    self.bars[device]
                        + layout::NOTIFY
                        + u64::from(layout::NOTIFY_MULTIPLIER) * queue as u64,
                );
            }
            // Anything anywhere: headers, messages, indirect tables, the rings' own words.
            12 | 13 => {
                let at = u64::from(input.word()) << 2;
                for offset in 0..u64::from(step >> 4) * 4 {
                    let _ = self.memory.write_obj(input.byte(), GuestAddress(at + offset));
                }
            }
            // The host's side.
            14 => match step >> 4 {
                0 => self.mem.lock().expect("a lock").request(u64::from(input.word()) << 20),
                1 => {
                    let _ = self.vsock.lock().expect("a lock").connect(input.long(), 1);
                }
                2 => {
                    let _ = self.wire.send(&vec![step; usize::from(input.word())]);
                }
                3 => {
                    for mut stream in self.streams.0.lock().expect("a lock").iter() {
                        let _ = stream.write(&vec![step; usize::from(input.byte())]);
                    }
                }
                4 => self.streams.0.lock().expect("a lock").clear(),
                // What a file server that was taken over would answer.
                _ => {
                    let length = usize::from(input.byte());
                    let bytes: Vec<u8> = (0..length).map(|_| input.byte()).collect();
                    let at = usize::from(step >> 4) % self.files.len();
                    let _ = (&self.files[at]).write(&bytes);
                }
            },
            _ => {
                let slot = input.byte() & 31;
                let mut data = [0; 4];
                self.bus.config_read(slot, input.byte(), &mut data);
                self.bus.config_write(slot, input.byte(), &input.long().to_le_bytes());
            }
        }
        self.turn();
    }

    fn turn(&mut self) {
        let mut bytes = [0; 1 << 16];
        for _ in 0..TURNS {
            let events = self.manager.run_with_timeout(0).expect("the event loop");
            let mut heard = false;
            for mut stream in self.files.iter().chain(self.streams.0.lock().expect("a lock").iter())
            {
                while stream.read(&mut bytes).is_ok_and(|count| count > 0) {
                    heard = true;
                }
            }
            while self.wire.recv(&mut bytes).is_ok() {
                heard = true;
            }
            if events == 0 && !heard {
                return;
            }
        }
        // Where rings and buffers lie over one another a device may feed itself for ever: what counts
        // is that each of its turns ends.
    }
}

/// One guest's life.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut guest = Guest::new();
    while !input.is_empty() {
        guest.step(&mut input);
    }
}
