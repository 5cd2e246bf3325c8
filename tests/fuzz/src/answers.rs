//! The machine's end of the courier: a file system device whose file server lies.
//!
//! Whatever it answers, the device writes only into what the guest gave it to write to, and rests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_vmm::devices::virtio::fs::Fs;
use husk_vmm::devices::virtio::{Activation, VirtioDevice};
use husk_vmm::vm::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::courier::{IN_HEADER, OUT_HEADER};
use crate::input::Input;
use crate::parts::{self, SIZE};

const MEMORY: usize = 0x2_0000;
/// The requests' place, one page for each; and behind them what is written to.
const REQUESTS: u64 = 0x4000;
const ROOM: u64 = 0x14000;
const SLOT: u64 = 0x400;
/// What no answer holds.
const UNTOUCHED: u8 = 0xa5;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TURNS: usize = 256;

struct Guest {
    memory: GuestMemory,
    fs: Arc<Mutex<Fs>>,
    manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    files: Vec<UnixStream>,
    kick: EventFd,
    /// Bytes that may be written for each slot.
    room: [u64; SIZE as usize / 2],
    offered: u16,
    queue: u64,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        memory.write_slice(&[UNTOUCHED; 0x8000], GuestAddress(ROOM)).expect("memory");
        let (fs, files) = parts::fs();
        let fs = Arc::new(Mutex::new(fs));
        let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().expect("an event loop");
        manager.add_subscriber(fs.clone());
        let count = fs.lock().expect("a lock").queue_sizes().len();
        let mut kicks = Vec::new();
        let queues = (0..count as u64).map(|number| {
            let (queue, kick) = parts::queue(0x1000 * number);
            kicks.push(kick);
            queue
        });
        let queues = queues.collect();
        let activation = Activation { memory: memory.clone().into(), features: 1 << 32, queues };
        fs.lock().expect("a lock").activate(activation).expect("an active device");
        let queue = 0x1000 * (count as u64 - 1);
        let kick = kicks.pop().expect("a queue");
        Self { memory, fs, manager, files, kick, room: [0; 8], offered: 0, queue }
    }

    /// Offers a request of two descriptors, or of one if nothing may be answered.
    fn offer(&mut self, input: &mut Input<'_>) {
        let slot = u64::from(self.offered) % 8;
        let unique = u64::from(self.offered) + 1;
        let opcode = u32::from(input.byte() % 52);
        let extra = u64::from(input.byte());
        let length = IN_HEADER as u64 + extra;
        let at = REQUESTS + slot * SLOT;
        let header = length | u64::from(opcode) << 32;
        self.write(header, at);
        self.write(unique, at + 8);
        let room = match input.byte() {
            0 => 0,
            byte => u64::from(byte) * 4,
        };
        self.room[usize::try_from(slot).expect("small")] = room;
        let descriptor = self.queue + 32 * slot;
        let flags = if room == 0 { 0 } else { NEXT };
        let next = u16::try_from(2 * slot + 1).expect("small");
        self.describe(descriptor, (at, length, flags, next));
        self.describe(descriptor + 16, (ROOM + slot * SLOT, room, WRITE, 0));
        let ring = self.queue + 0x400;
        let head = u16::try_from(2 * slot).expect("small");
        self.write(head, ring + 4 + 2 * u64::from(self.offered % SIZE));
        self.offered += 1;
        self.write(self.offered, ring + 2);
        self.kick.write(1).expect("an eventfd");
    }

    fn describe(&self, at: u64, (address, length, flags, next): (u64, u64, u16, u16)) {
        self.write(address, at);
        self.write(u32::try_from(length).expect("small"), at + 8);
        self.write(flags, at + 12);
        self.write(next, at + 14);
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).expect("memory");
    }

    /// What the file server says on a channel: nearly an answer to the request that it got there.
    fn answer(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let channel = usize::from(choice) % self.files.len();
        let mut request = [0; 4096];
        let got = (&self.files[channel]).read(&mut request).unwrap_or(0);
        let mut unique = [0; 8];
        unique.copy_from_slice(&request[8..16]);
        if got < IN_HEADER || choice & 0x80 != 0 {
            unique = u64::from(input.byte()).to_ne_bytes();
        }
        let there = usize::from(input.word()) % 1200;
        let said = match input.byte() {
            0 => input.long(),
            byte @ 1..=8 => u32::try_from(there).expect("small") + u32::from(byte),
            9 => 0,
            _ => u32::try_from(there + OUT_HEADER).expect("small"),
        };
        let mut answer = said.to_ne_bytes().to_vec();
        answer.extend((-i32::from(input.byte() & choice)).to_ne_bytes());
        answer.extend(unique);
        answer.resize(OUT_HEADER + there, 0x5a);
        if choice & 0x40 != 0 {
            answer.truncate(usize::from(input.byte()));
        }
        let _ = (&self.files[channel]).write(&answer);
    }

    fn turn(&mut self) {
        for _ in 0..TURNS {
            if self.manager.run_with_timeout(0).expect("the event loop") == 0 {
                return self.check();
            }
        }
        panic!("the device does not rest");
    }

    /// Nothing is written but where it may be, and no request is done twice.
    fn check(&self) {
        let mut bytes = vec![0; usize::try_from(SLOT).expect("small")];
        for (slot, room) in (0..).zip(self.room) {
            self.memory.read_slice(&mut bytes, GuestAddress(ROOM + slot * SLOT)).expect("memory");
            let beyond = &bytes[usize::try_from(room).expect("small")..];
            assert!(beyond.iter().all(|&byte| byte == UNTOUCHED));
        }
        let used: u16 = self.memory.read_obj(GuestAddress(self.queue + 0x802)).expect("memory");
        assert!(used <= self.offered);
        for at in 0..used {
            let entry = self.queue + 0x804 + 8 * u64::from(at % SIZE);
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).expect("memory");
            let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).expect("memory");
            assert!(u64::from(length) <= self.room[head as usize / 2]);
        }
    }
}

/// One guest's requests and what comes back.
pub fn run(input: &mut Input<'_>) {
    let mut guest = Guest::new();
    while !input.is_empty() {
        match input.byte() % 8 {
            0..=2 if guest.offered < 8 => guest.offer(input),
            7 => {
                if input.byte() == 0 {
                    guest.files.remove(0);
                    if guest.files.is_empty() {
                        break;
                    }
                }
            }
            _ => guest.answer(input),
        }
        guest.turn();
    }
    guest.fs.lock().expect("a lock").reset();
    guest.turn();
}
