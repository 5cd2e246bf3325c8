//! The connections, and who is next.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use event_manager::{EventOps, EventSet, Events};

use super::connection::{Connection, Phase, Ports};
use super::packet::Header;
use super::{ConnectError, StreamSink};
use crate::devices::virtio::socket;

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 1024;
/// Event data of a connection is its slot plus this.
pub const FIRST_TOKEN: u32 = 0x100;
/// Host ports of connections that we ask for.
const FIRST_OWN_PORT: u32 = 0xc000_0000;
/// Resets that may wait for a buffer of the guest's before its packets wait, too.
const MAX_RESETS: usize = 128;

/// Numbers for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections there are now.
    pub streams: u64,
    /// Bytes from the guest so far.
    pub from_guest: u64,
    /// Bytes to the guest so far.
    pub to_guest: u64,
}

/// A host port that is open to the guest.
#[derive(Debug)]
pub struct Listener {
    /// The guest's port that connections come from; `None` for any.
    pub from: Option<u32>,
    /// The host's end of a connection.
    pub end: HostEnd,
}

/// The host's end of the guest's connection to an open port.
#[derive(Debug)]
pub enum HostEnd {
    /// A pair is made for each connection.
    Every,
    /// One connection is joined to this socket, which closes the port.
    Over(OwnedFd),
}

impl Listener {
    /// A port for all connections that come, with a pair for each.
    pub fn pairs() -> Self {
        Self { from: None, end: HostEnd::Every }
    }

    /// A port for one connection, from the guest's port `from`, that is joined to `stream`.
    pub fn over(stream: OwnedFd, from: Option<u32>) -> Self {
        Self { from, end: HostEnd::Over(stream) }
    }
}

/// All connections of a guest.
pub struct Mux {
    slots: Vec<Option<Connection>>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    /// Slots of connections that have something for the guest.
    pub(super) ready: VecDeque<u32>,
    /// Resets for packets that belong to no connection.
    pub(super) resets: VecDeque<Header>,
    /// Host ports open to the guest.
    pub(super) listeners: HashMap<u32, Listener>,
    pub(super) sink: Box<dyn StreamSink>,
    pub(super) counters: Counters,
    next_port: u32,
}

impl Mux {
    /// No connections, no ports open.
    pub fn new(sink: Box<dyn StreamSink>) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            listeners: HashMap::new(),
            sink,
            counters: Counters::default(),
            next_port: FIRST_OWN_PORT,
        }
    }

    /// The numbers as they stand.
    pub fn counters(&self) -> Counters {
        let streams = self.slots.len() - self.free.len();
        Counters { streams: u64::try_from(streams).unwrap_or(u64::MAX), ..self.counters }
    }

    /// Bytes of the guest's that host ends have not taken yet.
    pub fn unsent(&self) -> usize {
        self.slots.iter().flatten().map(|connection| connection.backlog.len()).sum()
    }

    /// Whether packets of the guest's may be taken, each of which may call for a reset.
    pub fn has_room_for_resets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// The connection in a slot.
    pub fn get(&mut self, slot: u32) -> Option<&mut Connection> {
        self.slots.get_mut(usize::try_from(slot).ok()?)?.as_mut()
    }

    /// The slot of the connection with these ports.
    pub fn find(&self, ports: Ports) -> Option<u32> {
        self.by_ports.get(&ports).copied()
    }

    /// Whether another connection may be made.
    pub fn is_full(&self) -> bool {
        self.slots.len() - self.free.len() >= MAX_CONNECTIONS
    }

    /// Asks the guest for a connection; the answer comes through the sink.
    pub fn connect(&mut self, port: u32, request: u64) -> Result<(), ConnectError> {
        if self.is_full() {
            return Err(ConnectError::TooMany);
        }
        let ports = loop {
            let ports = Ports { guest: port, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_OWN_PORT);
            // Ends: there are far more ports than connections and listeners.
            if !self.by_ports.contains_key(&ports) && !self.listeners.contains_key(&ports.host) {
                break ports;
            }
        };
        let slot = self.insert(Connection::request(ports, request));
        self.enqueue(slot);
        Ok(())
    }

    /// Adds a connection; the caller has made sure that there is room.
    pub fn insert(&mut self, connection: Connection) -> u32 {
        let ports = connection.ports;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                // At most `MAX_CONNECTIONS`.
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        if let Some(place) = usize::try_from(slot).ok().and_then(|at| self.slots.get_mut(at)) {
            *place = Some(connection);
        }
        self.by_ports.insert(ports, slot);
        slot
    }

    /// Makes the pair for the connection in `slot` and has its end watched; returns theirs.
    pub fn join(&mut self, slot: u32, ops: &mut EventOps<'_>) -> io::Result<OwnedFd> {
        let (ours, theirs) = socket::pair()?;
        if let Some(connection) = self.get(slot) {
            connection.open(ours);
        }
        self.watch(slot, ops)?;
        Ok(theirs)
    }

    /// Has the connection's socket watched; without that it has no future.
    pub fn watch(&mut self, slot: u32, ops: &mut EventOps<'_>) -> io::Result<()> {
        let Some(connection) = self.get(slot) else { return Ok(()) };
        let Some(socket) = &connection.socket else { return Ok(()) };
        let added = ops.add(interest(socket.as_raw_fd(), slot, false));
        if added.is_err() {
            connection.socket = None;
        }
        added.map_err(io::Error::other)
    }

    /// Gives the connection a turn if it wants one.
    pub fn enqueue(&mut self, slot: u32) {
        if let Some(connection) = self.get(slot)
            && !connection.queued
            && connection.wants_turn()
        {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// Whatever follows from what has just happened to a connection: passing on ends, watching for
    /// room, letting go of sockets and slots. Called after every change.
    pub fn settle(&mut self, slot: u32, ops: &mut EventOps<'_>) {
        let Some(connection) = self.get(slot) else { return };
        connection.settle();
        let wants_room = !connection.backlog.is_empty();
        if connection.is_socket_done() {
            if let Some(socket) = connection.socket.take() {
                // It is registered as long as we hold it; the event loop must forget it before it
                // closes.
                let _ = ops.remove(Events::empty(&socket));
            }
        } else if wants_room != connection.watching_room
            && let Some(socket) = &connection.socket
        {
            connection.watching_room = wants_room;
            let _ = ops.modify(interest(socket.as_raw_fd(), slot, wants_room));
        }
        if connection.phase == Phase::Leaving && connection.socket.is_none() {
            self.remove(slot);
        } else {
            self.enqueue(slot);
        }
    }

    /// The guest has gone from the connection; its ports are free at once.
    pub fn leave(&mut self, slot: u32) {
        let Some(connection) = self.get(slot) else { return };
        let (ports, phase) = (connection.ports, connection.phase);
        connection.phase = Phase::Leaving;
        if phase != Phase::Leaving {
            self.by_ports.remove(&ports);
        }
    }

    /// The guest has reset the device: it has gone from everywhere. From any thread; the event
    /// loop follows up with [`Mux::sweep`].
    pub fn leave_all(&mut self) -> Vec<u64> {
        let mut requests = Vec::new();
        self.resets.clear();
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            if let Some(Phase::Requested(request)) = self.get(slot).map(|c| c.phase) {
                requests.push(request);
            }
            self.leave(slot);
        }
        requests
    }

    /// Settles every connection that is leaving.
    pub fn sweep(&mut self, ops: &mut EventOps<'_>) {
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            if self.get(slot).is_some_and(|connection| connection.phase == Phase::Leaving) {
                self.settle(slot, ops);
            }
        }
    }

    /// Something has happened at a host end.
    pub fn socket_event(&mut self, slot: u32, fd: RawFd, set: EventSet, ops: &mut EventOps<'_>) {
        let Some(connection) = self.get(slot) else { return };
        // An event of the slot's former connection may still be on the way.
        if connection.socket.as_ref().map(AsRawFd::as_raw_fd) != Some(fd) {
            return;
        }
        if set.contains(EventSet::OUT) {
            connection.flush();
        }
        let end = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
        if set.intersects(EventSet::IN | end) {
            connection.readable = true;
        }
        connection.hung_up |= set.intersects(end);
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.host_hung_up();
        }
        self.settle(slot, ops);
    }

    fn remove(&mut self, slot: u32) {
        if let Some(place) = usize::try_from(slot).ok().and_then(|at| self.slots.get_mut(at))
            && place.take().is_some()
        {
            self.free.push(slot);
        }
    }
}

/// Edge-triggered: the connection remembers what it has been told. Room is watched for only while
/// something waits for it, else every read at the other end would wake us.
fn interest(fd: RawFd, slot: u32, room: bool) -> Events {
    let mut set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room {
        set |= EventSet::OUT;
    }
    Events::with_data_raw(fd, slot.saturating_add(FIRST_TOKEN), set)
}
