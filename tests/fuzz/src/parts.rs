//! Devices, and what stands in for the machine round them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use husk_vmm::devices::virtio::ActiveQueue;
use husk_vmm::devices::virtio::fs::Fs;
use husk_vmm::devices::virtio::mem::{Mem, Watcher};
use husk_vmm::devices::virtio::net::{Net, NetConfig, Tap};
use husk_vmm::devices::virtio::rng::Rng;
use husk_vmm::devices::virtio::vsock::{ConnectError, StreamSink, Vsock};
use husk_vmm::vm::{BlockBacking, BlockRange, GuestMemory, MsiVector, Wiring};
use slog::{Discard, Logger, o};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupt::Interrupt;

/// A log that nobody reads.
pub fn logger() -> Logger {
    Logger::root(Discard, o!())
}

/// Entries of a queue.
pub const SIZE: u16 = 16;

/// A queue whose table is at `base`, its rings 0x400 and 0x800 behind it, and what kicks it.
pub fn queue(base: u64) -> (ActiveQueue, EventFd) {
    let mut queue = Queue::new(SIZE).expect("a queue");
    queue.try_set_desc_table_address(GuestAddress(base)).expect("an address");
    queue.try_set_avail_ring_address(GuestAddress(base + 0x400)).expect("an address");
    queue.try_set_used_ring_address(GuestAddress(base + 0x800)).expect("an address");
    queue.set_ready(true);
    let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let kicks = kick.try_clone().expect("a descriptor");
    let interrupt = Arc::new(Interrupt::new().expect("an eventfd"));
    (ActiveQueue { queue, kick, interrupt }, kicks)
}

/// What KVM would do: a write to an address becomes an event.
#[derive(Default)]
pub struct Wires(Mutex<Vec<(u64, EventFd)>>);

impl Wires {
    /// The guest writes there.
    pub fn write(&self, address: u64) {
        for (at, event) in self.0.lock().expect("a lock").iter() {
            if *at == address {
                let _ = event.write(1);
            }
        }
    }
}

impl Wiring for Wires {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Interrupt::new()?))
    }
    fn notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.lock().expect("a lock").push((address, event.try_clone()?));
        Ok(())
    }
    fn unnotify(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().expect("a lock").retain(|(at, _)| *at != address);
        Ok(())
    }
}

/// The shim's side of streams: what it is given, it keeps for a while.
#[derive(Clone, Default)]
pub struct Streams(pub Arc<Mutex<Vec<UnixStream>>>);

impl Streams {
    fn take(&self, stream: OwnedFd) {
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true).expect("a flag");
        let mut all = self.0.lock().expect("a lock");
        all.push(stream);
        if all.len() > 8 {
            all.remove(0);
        }
    }
}

impl StreamSink for Streams {
    fn connection(&mut self, _port: u32, stream: Option<OwnedFd>) {
        if let Some(stream) = stream {
            self.take(stream);
        }
    }
    fn connected(&mut self, _request: u64, result: Result<OwnedFd, ConnectError>) {
        if let Ok(stream) = result {
            self.take(stream);
        }
    }
}

/// Blocks that are always to be had.
struct Blocks;

impl BlockBacking for Blocks {
    fn plug(&mut self, _index: u64) -> io::Result<()> {
        Ok(())
    }
    fn unplug(&mut self, _index: u64) -> io::Result<()> {
        Ok(())
    }
}

struct Nobody;

impl Watcher for Nobody {
    fn reached(&mut self, _request: u64, _result: Result<u64, &'static str>) {}
}

/// An entropy device.
pub fn rng() -> Rng {
    Rng::new(logger()).expect("a device")
}

/// A socket device.
pub fn vsock(streams: Streams) -> Vsock {
    Vsock::new(Box::new(streams), logger()).expect("a device")
}

/// A file system device, and the file server's ends of its channels.
pub fn fs() -> (Fs, Vec<UnixStream>) {
    let (channels, files): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| {
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            theirs.set_nonblocking(true).expect("a flag");
            (OwnedFd::from(ours), theirs)
        })
        .unzip();
    (Fs::new("husk", channels, logger()).expect("a device"), files)
}

/// A memory device above `memory`.
pub fn mem(memory: &GuestMemory) -> Mem {
    let range = BlockRange::above(memory, 512 << 20, 46).expect("a range");
    Mem::new(range, Box::new(Blocks), Box::new(Nobody), logger()).expect("a device")
}

/// A network device of one pair of queues, and the wire.
pub fn net() -> (Net, UnixDatagram) {
    let (ours, wire) = UnixDatagram::pair().expect("a pair of sockets");
    wire.set_nonblocking(true).expect("a flag");
    let config = NetConfig {
        taps: Vec::new(),
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        receive_limit: None,
        send_limit: None,
    };
    let taps = vec![Tap::stand_in(ours.into()).expect("a stand-in")];
    (Net::over(taps, config, logger()).expect("a device"), wire)
}
