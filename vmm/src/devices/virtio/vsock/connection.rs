//! One connection.

use std::io;
use std::os::fd::OwnedFd;

use husk_control::{GUEST_CID, HOST_CID};

use super::backlog::Backlog;
use super::credit::{BUFFER, Credit};
use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op};
use crate::devices::virtio::chain::Segments;
use crate::devices::virtio::socket;

/// Both ends' ports: what tells connections apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's.
    pub guest: u32,
    /// The host's.
    pub host: u32,
}

/// Where a connection stands; the diagram is in the parent's docs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// We want to connect, for the request of that number.
    Requested(u64),
    /// Data may flow.
    Open,
    /// The guest has gone; what it sent is still being delivered.
    Leaving,
}

/// What is to be told the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tell {
    /// The operation.
    pub op: u16,
    /// Its flags.
    pub flags: u32,
}

/// One connection.
pub struct Connection {
    /// Its ports.
    pub ports: Ports,
    /// Where it stands.
    pub phase: Phase,
    /// Our end of the pair; none before it is open and after the host end has gone.
    pub socket: Option<OwnedFd>,
    /// The credit of both directions.
    pub credit: Credit,
    /// What the socket did not take.
    pub backlog: Backlog,
    /// In the list of those that want a turn.
    pub queued: bool,
    /// The socket may have something to read.
    pub readable: bool,
    /// The event loop watches for room in the socket.
    pub watching_room: bool,
    /// Packets to read in one go: grows while the socket has more.
    pub burst: usize,
    /// The host end has shut or closed: read on until the end.
    pub hung_up: bool,
    /// Nothing more comes from the host end.
    pub host_sent_all: bool,
    /// The host end takes nothing more.
    pub host_takes_none: bool,
    guest_sent_all: bool,
    guest_takes_none: bool,
    opening: Option<u16>,
    credit_wanted: bool,
    credit_asked: bool,
    shut_told: u32,
    shut_write: bool,
}

impl Connection {
    /// One that we ask the guest for.
    pub fn request(ports: Ports, request: u64) -> Self {
        Self::new(ports, Phase::Requested(request), None, op::REQUEST)
    }

    /// One that the guest asked for and gets.
    pub fn accept(ports: Ports, socket: OwnedFd) -> Self {
        Self::new(ports, Phase::Open, Some(socket), op::RESPONSE)
    }

    fn new(ports: Ports, phase: Phase, socket: Option<OwnedFd>, opening: u16) -> Self {
        Self {
            ports,
            phase,
            socket,
            credit: Credit::default(),
            backlog: Backlog::default(),
            queued: false,
            readable: false,
            watching_room: false,
            burst: 1,
            hung_up: false,
            host_sent_all: false,
            host_takes_none: false,
            guest_sent_all: false,
            guest_takes_none: false,
            opening: Some(opening),
            credit_wanted: false,
            credit_asked: false,
            shut_told: 0,
            shut_write: false,
        }
    }

    /// The guest has accepted.
    pub fn open(&mut self, socket: OwnedFd) {
        self.phase = Phase::Open;
        self.socket = Some(socket);
    }

    /// Takes the credit fields of a header of the guest's.
    pub fn learn(&mut self, header: &Header) {
        self.credit.learn(header.buf_alloc, header.fwd_cnt);
        if self.credit.room() > 0 {
            self.credit_asked = false;
        }
    }

    /// The guest wants to know its credit.
    pub fn want_credit(&mut self) {
        self.credit_wanted = true;
    }

    /// Data of the guest's. `false`: it had no right to send them.
    pub fn deliver(&mut self, data: &mut Segments) -> bool {
        let Ok(len) = u32::try_from(data.len()) else { return false };
        if self.guest_sent_all || !self.credit.receive(len) {
            return false;
        }
        if self.backlog.is_empty() {
            while !data.is_empty() && !self.host_takes_none {
                let Some(socket) = &self.socket else { break };
                match socket::send_segments(socket, data) {
                    Ok(Some(count)) => {
                        data.advance(count);
                        self.forward(count);
                    }
                    Ok(None) => break,
                    Err(error) => self.lose_host(&error),
                }
            }
        }
        if self.host_takes_none || self.socket.is_none() {
            self.forward(data.len());
        } else if !data.is_empty() {
            self.backlog.append(data);
        }
        true
    }

    /// Sends on what was kept, as far as it goes.
    pub fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let Some(socket) = &self.socket else { return };
            match socket::send_bytes(socket, self.backlog.bytes()) {
                Ok(Some(count)) => {
                    self.backlog.advance(count);
                    self.forward(count);
                }
                Ok(None) => return,
                Err(error) => self.lose_host(&error),
            }
        }
    }

    /// The host end takes nothing more: what waits for it is void.
    pub fn lose_host(&mut self, _error: &io::Error) {
        self.host_takes_none = true;
        let lost = self.backlog.len();
        self.backlog.advance(lost);
        self.forward(lost);
    }

    fn forward(&mut self, count: usize) {
        // Bounded by credit, far below 4 GiB.
        self.credit.forward(u32::try_from(count).unwrap_or(u32::MAX));
        self.credit_wanted |= self.credit.is_update_due();
    }

    /// The guest shuts directions; `true` if that leaves none.
    pub fn shut(&mut self, flags: u32) -> bool {
        self.guest_sent_all |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_takes_none {
            self.guest_takes_none = true;
            if let Some(socket) = &self.socket {
                socket::shutdown(socket, libc::SHUT_RD);
            }
        }
        self.guest_sent_all && self.guest_takes_none
    }

    /// Passes on the guest's end-of-file once everything before it is out.
    pub fn settle(&mut self) {
        if self.guest_sent_all && self.backlog.is_empty() && !self.shut_write {
            self.shut_write = true;
            if let Some(socket) = &self.socket {
                socket::shutdown(socket, libc::SHUT_WR);
            }
        }
    }

    /// The host end has hung up altogether (not merely because both directions were shut).
    pub fn host_hung_up(&mut self) {
        if !self.shut_write {
            self.lose_host(&io::Error::from(io::ErrorKind::BrokenPipe));
        }
        // Nobody will read to the end what the guest does not take.
        self.host_sent_all |= self.guest_takes_none;
    }

    /// Nothing is left to do for the socket.
    pub fn is_socket_done(&self) -> bool {
        match self.phase {
            Phase::Leaving => self.backlog.is_empty(),
            _ => self.host_sent_all && self.host_takes_none,
        }
    }

    /// Whether the socket should be read now.
    pub fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.opening.is_none()
            && self.socket.is_some()
            && self.readable
            && !self.host_sent_all
            && !self.guest_takes_none
    }

    /// Whether there is something for the guest.
    pub fn wants_turn(&self) -> bool {
        self.next_tell().is_some() || (self.may_read() && self.credit.room() > 0)
    }

    /// What to tell the guest next, data apart.
    pub fn next_tell(&self) -> Option<Tell> {
        let plain = |op| Some(Tell { op, flags: 0 });
        if self.phase == Phase::Leaving {
            return None;
        }
        if let Some(op) = self.opening {
            return plain(op);
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.credit_wanted {
            return plain(op::CREDIT_UPDATE);
        }
        let ended = if self.host_sent_all { SHUTDOWN_SEND } else { 0 }
            | if self.host_takes_none { SHUTDOWN_RECEIVE } else { 0 };
        if ended & !self.shut_told != 0 {
            return Some(Tell { op: op::SHUTDOWN, flags: ended });
        }
        if self.may_read() && self.credit.room() == 0 && !self.credit_asked {
            return plain(op::CREDIT_REQUEST);
        }
        None
    }

    /// It has been told.
    pub fn told(&mut self, tell: Tell) {
        match tell.op {
            op::SHUTDOWN => self.shut_told |= tell.flags,
            op::CREDIT_REQUEST => self.credit_asked = true,
            op::REQUEST | op::RESPONSE => self.opening = None,
            _ => {}
        }
    }

    /// A header to the guest. It carries the latest credit, so an update is no longer wanted.
    pub fn header(&mut self, op: u16, flags: u32, len: u32) -> Header {
        self.credit_wanted = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.credit.tell(),
        }
    }
}
