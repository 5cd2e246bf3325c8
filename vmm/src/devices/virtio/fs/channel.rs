//! One channel to the file server.

use std::io;
use std::os::fd::OwnedFd;

use super::message::{InHeader, OUT_HEADER, OutHeader};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::socket;
use crate::fuse::{IN_HEADER, LONGEST};

/// Where a channel stands; the diagram is in the parent's docs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Sending,
    Waiting,
    Dead,
}

/// What came of driving a channel.
#[derive(Debug)]
pub enum Progress {
    /// It waits for the file server.
    Pending,
    /// The request is done: so many bytes were written for the guest.
    Done(usize),
}

/// Why a channel died.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("socket")]
    Socket(#[from] io::Error),
    /// The file server closed it.
    #[error("closed by the file server")]
    Closed,
    /// The answer is not one to this request, or of an impossible length.
    #[error("answer out of frame")]
    Frame,
}

/// A list of segments for one system call; empty in between.
#[derive(Default)]
pub struct Segments(Vec<libc::iovec>);

// SAFETY: the pointers are put in, used and taken out within one call.
unsafe impl Send for Segments {}

/// One channel.
pub struct Channel {
    /// Our end.
    pub socket: OwnedFd,
    state: State,
    /// The request under way, or the last one.
    pub chain: Chain,
    /// The queue it came from.
    pub queue: usize,
    /// The guest has forgotten it: nothing may be written for it any more.
    pub abandoned: bool,
    /// The event loop watches for room in the socket.
    pub watching_room: bool,
    request: InHeader,
    header: [u8; IN_HEADER],
    sent: usize,
    answer: [u8; OUT_HEADER],
    got: usize,
}

impl Channel {
    /// An idle one.
    pub fn new(socket: OwnedFd) -> Self {
        socket::widen(&socket);
        Self {
            socket,
            state: State::Idle,
            chain: Chain::default(),
            queue: 0,
            abandoned: false,
            watching_room: false,
            request: InHeader::default(),
            header: [0; IN_HEADER],
            sent: 0,
            answer: [0; OUT_HEADER],
            got: 0,
        }
    }

    /// Whether it has a request under way.
    pub fn is_busy(&self) -> bool {
        matches!(self.state, State::Sending | State::Waiting)
    }

    /// Whether it is of no more use.
    pub fn is_dead(&self) -> bool {
        self.state == State::Dead
    }

    /// Whether it waits for room in the socket.
    pub fn wants_room(&self) -> bool {
        self.state == State::Sending
    }

    /// The number of the request under way.
    pub fn unique(&self) -> u64 {
        self.request.unique
    }

    /// The request under way expects an answer.
    pub fn wants_answer(&self) -> bool {
        self.request.wants_answer()
    }

    /// Begins with the request loaded into [`Channel::chain`], whose header was copied and checked.
    pub fn begin(&mut self, header: [u8; IN_HEADER], queue: usize) {
        self.request = InHeader::decode(&header);
        self.header = header;
        self.queue = queue;
        self.abandoned = false;
        self.sent = 0;
        self.got = 0;
        self.chain.readable.advance(IN_HEADER);
        self.state = State::Sending;
    }

    /// Of no more use from now on; the file server sees its end.
    pub fn bury(&mut self) {
        self.state = State::Dead;
        socket::shutdown(&self.socket, libc::SHUT_RDWR);
    }

    /// Sends and receives as far as it goes.
    pub fn drive(&mut self, segments: &mut Segments) -> Result<Progress, ChannelError> {
        if self.state == State::Sending && self.send(segments)? {
            if !self.request.wants_answer() {
                self.state = State::Idle;
                return Ok(Progress::Done(0));
            }
            self.state = State::Waiting;
            // The answer's coming is an event of its own, unless it was announced before all of the
            // request was out.
            if !self.watching_room {
                return Ok(Progress::Pending);
            }
        }
        if self.state == State::Waiting { self.receive(segments) } else { Ok(Progress::Pending) }
    }

    /// Whether all has been sent.
    fn send(&mut self, segments: &mut Segments) -> Result<bool, ChannelError> {
        loop {
            let list = &mut segments.0;
            list.clear();
            if self.sent < IN_HEADER {
                let rest = &self.header[self.sent..];
                let base = rest.as_ptr().cast_mut().cast();
                list.push(libc::iovec { iov_base: base, iov_len: rest.len() });
            }
            list.extend_from_slice(self.chain.readable.iovecs());
            if list.is_empty() {
                return Ok(true);
            }
            // SAFETY: the header is ours; the rest lies in guest memory, which the chain keeps
            // mapped.
            let count = unsafe { socket::send(&self.socket, list) };
            list.clear();
            let Some(count) = count? else { return Ok(false) };
            let header = count.min(IN_HEADER - self.sent.min(IN_HEADER));
            self.sent += header;
            self.chain.readable.advance(count - header);
        }
    }

    fn receive(&mut self, segments: &mut Segments) -> Result<Progress, ChannelError> {
        let mut scrap = if self.abandoned { vec![0_u8; 4096] } else { Vec::new() };
        loop {
            let list = &mut segments.0;
            list.clear();
            let rest = &mut self.answer[self.got.min(OUT_HEADER)..];
            if !rest.is_empty() {
                let base = rest.as_mut_ptr().cast();
                list.push(libc::iovec { iov_base: base, iov_len: rest.len() });
            }
            if self.abandoned {
                let base = scrap.as_mut_ptr().cast();
                list.push(libc::iovec { iov_base: base, iov_len: scrap.len() });
            } else {
                // The header's place is left alone till the header is known to be good.
                let mut skip = self.got.max(OUT_HEADER);
                for iovec in self.chain.writable.iovecs() {
                    let skipped = skip.min(iovec.iov_len);
                    skip -= skipped;
                    if iovec.iov_len > skipped {
                        let base = iovec.iov_base.cast::<u8>().wrapping_add(skipped).cast();
                        let iov_len = iovec.iov_len - skipped;
                        list.push(libc::iovec { iov_base: base, iov_len });
                    }
                }
            }
            // SAFETY: header and scrap are ours; the rest lies in guest memory, which the chain
            // keeps mapped, and nobody here relies on it.
            let count = unsafe { socket::receive(&self.socket, list) };
            list.clear();
            match count? {
                None => return Ok(Progress::Pending),
                Some(0) => return Err(ChannelError::Closed),
                Some(count) => self.got += count,
            }
            if self.got < OUT_HEADER {
                continue;
            }
            let answer = OutHeader::decode(&self.answer);
            let len = usize::try_from(answer.len).unwrap_or(usize::MAX);
            let most = if self.abandoned { LONGEST } else { self.chain.writable.len() };
            if answer.unique != self.request.unique || len > most || self.got > len {
                return Err(ChannelError::Frame);
            }
            if self.got == len {
                self.state = State::Idle;
                if !self.abandoned {
                    self.chain.writable.copy_in(&self.answer);
                }
                return Ok(Progress::Done(len));
            }
        }
    }
}
