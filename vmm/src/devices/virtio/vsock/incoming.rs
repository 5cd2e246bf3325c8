//! Packets from the guest.

use std::os::fd::OwnedFd;

use event_manager::EventOps;
use husk_control::{GUEST_CID, HOST_CID};

use super::ConnectError;
use super::connection::{Connection, Phase, Ports};
use super::mux::{HostEnd, Listener, Mux};
use super::packet::{HEADER, Header, STREAM, op};
use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::socket;

/// A packet is a header and no more data than credit allows.
const LIMITS: Limits = Limits { readable: HEADER + super::BUFFER as usize, writable: 0 };
/// Packets taken before others have their turn.
const ROUND: usize = 128;

/// How a round of taking packets ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// There are no more; the guest will kick.
    Empty,
    /// There may be more.
    More,
    /// Resets wait for buffers of the guest's, and so do its packets.
    Stalled,
}

/// What is wrong with a packet.
pub type Fault = &'static str;

impl Mux {
    /// Takes packets out of the queue. `report` is told of bad ones.
    pub fn take_packets(
        &mut self,
        tx: &mut Ring,
        chain: &mut Chain,
        ops: &mut EventOps<'_>,
        mut report: impl FnMut(Fault),
    ) -> Round {
        tx.decline_kicks();
        for _ in 0..ROUND {
            if !self.has_room_for_resets() {
                return Round::Stalled;
            }
            match tx.pop(chain, LIMITS) {
                None if tx.ask_for_kicks() => tx.decline_kicks(),
                None => return Round::Empty,
                Some(Err(_)) => report("bad descriptor chain"),
                Some(Ok(())) => {
                    if let Err(fault) = self.take_packet(chain, ops) {
                        report(fault);
                    }
                    tx.give_back(chain.head(), 0);
                }
            }
        }
        Round::More
    }

    fn take_packet(&mut self, chain: &mut Chain, ops: &mut EventOps<'_>) -> Result<(), Fault> {
        let mut bytes = [0; HEADER];
        if chain.readable.copy_out(&mut bytes) != HEADER {
            return Err("packet shorter than its header");
        }
        chain.readable.advance(HEADER);
        let header = Header::decode(&bytes);
        // A packet that does not say who it is for cannot even be answered.
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            return Err("packet from or to somebody else");
        }
        if header.kind != STREAM {
            self.refuse(&header);
            return Err("not a stream");
        }
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        let Some(slot) = self.find(ports) else {
            return match header.op {
                op::REQUEST => self.accept(ports, &header, ops),
                op::RST => Ok(()),
                _ => {
                    self.refuse(&header);
                    Ok(())
                }
            };
        };
        let result = self.take_known(slot, &header, chain, ops);
        if result.is_err() {
            self.refuse(&header);
            self.fail_request(slot, ConnectError::Refused);
            self.leave(slot);
        }
        self.settle(slot, ops);
        result
    }

    fn take_known(
        &mut self,
        slot: u32,
        header: &Header,
        chain: &mut Chain,
        ops: &mut EventOps<'_>,
    ) -> Result<(), Fault> {
        let Some(connection) = self.get(slot) else { return Ok(()) };
        connection.learn(header);
        match (header.op, connection.phase) {
            (op::RST, _) => {
                self.fail_request(slot, ConnectError::Refused);
                self.leave(slot);
            }
            (op::RESPONSE, Phase::Requested(request)) => {
                let result = self.join(slot, ops);
                if result.is_err() {
                    self.refuse(header);
                    self.leave(slot);
                }
                self.sink.connected(request, result.map_err(ConnectError::Socket));
            }
            (op::RW, Phase::Open) => {
                let len = usize::try_from(header.len).unwrap_or(usize::MAX);
                if len > chain.readable.len() {
                    return Err("packet shorter than it says");
                }
                chain.readable.truncate(len);
                if !connection.deliver(&mut chain.readable) {
                    return Err("more data than credit allows");
                }
                self.counters.from_guest += u64::from(header.len);
            }
            (op::SHUTDOWN, Phase::Open) => {
                if connection.shut(header.flags) {
                    self.refuse(header);
                    self.leave(slot);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open) => {}
            (op::CREDIT_REQUEST, Phase::Open) => connection.want_credit(),
            _ => return Err("operation out of turn"),
        }
        Ok(())
    }

    /// The guest asks for a connection.
    fn accept(
        &mut self,
        ports: Ports,
        header: &Header,
        ops: &mut EventOps<'_>,
    ) -> Result<(), Fault> {
        // A port that is not for this one looks like a port that nobody listens on.
        let listener = self.listeners.get(&ports.host);
        if listener.is_none_or(|one| one.from.is_some_and(|from| from != ports.guest)) {
            self.refuse(header);
            return Ok(());
        }
        if self.is_full() {
            self.refuse(header);
            return Err("too many connections");
        }
        let Some((ours, theirs)) = self.take_ends(ports.host) else {
            self.refuse(header);
            return Err("no socket pair");
        };
        let mut connection = Connection::accept(ports, ours);
        connection.learn(header);
        let slot = self.insert(connection);
        if self.watch(slot, ops).is_err() {
            self.refuse(header);
            self.leave(slot);
            self.settle(slot, ops);
            return Err("connection cannot be watched");
        }
        self.sink.connection(ports.host, theirs);
        self.enqueue(slot);
        Ok(())
    }

    /// The device's end of a stream for the open host port `port`, and the other end if that is with
    /// nobody yet.
    fn take_ends(&mut self, port: u32) -> Option<(OwnedFd, Option<OwnedFd>)> {
        let Listener { from, end } = self.listeners.remove(&port)?;
        match end {
            HostEnd::Over(ours) => {
                socket::widen(&ours);
                Some((ours, None))
            }
            HostEnd::Every => {
                self.listeners.insert(port, Listener { from, end: HostEnd::Every });
                socket::pair().ok().map(|(ours, theirs)| (ours, Some(theirs)))
            }
        }
    }

    /// Tells the sink that a connection it waits for does not come.
    fn fail_request(&mut self, slot: u32, error: ConnectError) {
        if let Some(Phase::Requested(request)) = self.get(slot).map(|c| c.phase) {
            self.sink.connected(request, Err(error));
        }
    }

    /// Answers a packet with a reset.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: op::RST,
            ..Header::default()
        });
    }
}
