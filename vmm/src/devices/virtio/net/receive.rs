//! Frames to the guest: from the tap straight into buffers of one queue.
//!
//! Nobody knows a frame's length before it has been read. So buffers are taken ahead, enough for the
//! longest frame if the guest has that many, and what a frame leaves over is there for the next one.
//! Behind them lies room of our own, which only a frame reaches that is longer than all of them: it
//! waits until the guest has given more, or is dropped if no number of buffers would do.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::Turn;
use super::header::{HEADER, LONGEST, NUM_BUFFERS};
use super::limiter::Limiter;
use super::metrics::Direction;
use super::tap::Tap;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::chain::{Chain, Limits, MAX_SEGMENTS};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::QueuePosition;
use crate::vm::LiveMemory;

const LIMITS: Limits = Limits { readable: 0, writable: 1 << 20 };
/// Frames, and buffers without use, before others have their turn.
const ROUND: usize = 256;
/// Frames after which the guest is told of them while there are more.
const BATCH: usize = 64;

/// The receiving side of a queue pair.
pub struct Receiver {
    ring: Ring,
    /// The guest knows that a frame may be spread over several buffers.
    mergeable: bool,
    size: usize,
    /// Taken from the ring, and empty.
    ready: VecDeque<Chain>,
    /// Bytes of them.
    room: usize,
    /// For chains to be taken.
    spare: Vec<Chain>,
    /// For chains to be given back.
    used: Vec<(u16, usize)>,
    /// A frame that waits for more buffers.
    held: Option<Vec<u8>>,
}

/// Room behind the guest's buffers; one for all queues of a device.
pub struct Spill(Box<[u8]>);

impl Default for Spill {
    fn default() -> Self {
        Self(vec![0; LONGEST].into_boxed_slice())
    }
}

impl Receiver {
    /// On a queue that has been activated.
    pub fn new(queue: ActiveQueue, memory: &Arc<LiveMemory>, mergeable: bool) -> Self {
        use virtio_queue::QueueT;
        let size = usize::from(queue.queue.size());
        Self {
            ring: Ring::new(queue.queue, queue.interrupt, Arc::clone(memory)),
            mergeable,
            size,
            ready: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            used: Vec::new(),
            held: None,
        }
    }

    /// Where it stands: buffers taken ahead are as if they had not been taken.
    pub fn position(&self) -> QueuePosition {
        let position = self.ring.position();
        // No more than the queue's size, which is a u16.
        let ahead = u16::try_from(self.ready.len()).unwrap_or(u16::MAX);
        QueuePosition { next_avail: position.next_avail.wrapping_sub(ahead), ..position }
    }

    /// Hands frames to the guest, at most [`ROUND`].
    pub fn run(
        &mut self,
        tap: &Tap,
        limiter: &mut Option<Limiter>,
        spill: &mut Spill,
        counters: &mut Direction,
    ) -> io::Result<Turn> {
        let mut pieces = Vec::new();
        self.ring.decline_kicks();
        for round in 1..=ROUND {
            if limiter.as_mut().is_some_and(|limiter| !limiter.is_open()) {
                return self.rest(Turn::Limited);
            }
            self.take_ahead();
            if let Some(frame) = self.held.take()
                && let Some(frame) = self.put(frame, limiter, counters)
            {
                self.held = Some(frame);
            }
            if self.held.is_some() || self.ready.is_empty() {
                if self.ring.ask_for_kicks() {
                    continue;
                }
                return self.rest(Turn::Idle);
            }
            let room = self.pieces(&mut pieces, spill);
            // SAFETY: the pieces lie in guest memory, which the chains keep mapped, and in `spill`,
            // of which nothing else is known meanwhile.
            let read = match unsafe { tap.read(&pieces) } {
                Ok(Some(read)) if read > 0 => read,
                // A tap has no end; what stands in for one may.
                Ok(_) => return self.rest(Turn::Idle),
                Err(error) => {
                    self.rest(Turn::Idle)?;
                    return Err(error);
                }
            };
            if read < HEADER {
                counters.drops += 1;
            } else if read <= room {
                self.deliver(read, limiter, counters);
            } else {
                self.hold(room, read, spill, counters);
            }
            if round % BATCH == 0 {
                self.ring.tell_guest()?;
            }
        }
        self.rest(Turn::More)
    }

    /// Reads frames and throws them away: the link is down.
    pub fn discard(tap: &Tap, spill: &mut Spill, counters: &mut Direction) -> io::Result<Turn> {
        let piece = spill.piece();
        for _ in 0..ROUND {
            // SAFETY: the piece is `spill`, of which nothing else is known meanwhile.
            match unsafe { tap.read(&[piece]) }? {
                Some(read) if read > 0 => counters.drops += 1,
                _ => return Ok(Turn::Idle),
            }
        }
        Ok(Turn::More)
    }

    fn rest(&mut self, turn: Turn) -> io::Result<Turn> {
        self.ring.tell_guest()?;
        Ok(turn)
    }

    /// Takes buffers until the longest frame has room, as far as the guest has given any.
    fn take_ahead(&mut self) {
        let mut useless = 0;
        while useless < ROUND && !self.is_enough() {
            let mut chain = self.spare.pop().unwrap_or_default();
            match self.ring.pop(&mut chain, LIMITS) {
                Some(Ok(())) if chain.writable.len() >= HEADER => {
                    self.room += chain.writable.len();
                    self.ready.push_back(chain);
                    continue;
                }
                // Has no room for a header.
                Some(Ok(())) => self.ring.give_back(chain.head(), 0),
                Some(Err(_)) => {}
                None => {
                    self.spare.push(chain);
                    return;
                }
            }
            useless += 1;
            self.spare.push(chain);
        }
    }

    fn is_enough(&self) -> bool {
        if self.mergeable {
            self.room >= LONGEST || self.ready.len() >= self.size
        } else {
            !self.ready.is_empty()
        }
    }

    /// The chains into which one frame may go: their number, their segments and their bytes.
    fn usable(&self) -> (usize, usize) {
        let most = if self.mergeable { usize::MAX } else { 1 };
        let (mut count, mut segments, mut room) = (0, 0, 0);
        for chain in self.ready.iter().take(most) {
            segments += chain.writable.iovecs().len();
            // One chain has no more than that, so the first always fits.
            if segments > MAX_SEGMENTS {
                break;
            }
            count += 1;
            room += chain.writable.len();
        }
        (count, room)
    }

    /// Lists the buffers and, behind them, the room of our own; returns the bytes of the buffers.
    fn pieces(&self, pieces: &mut Vec<libc::iovec>, spill: &mut Spill) -> usize {
        let (count, room) = self.usable();
        pieces.clear();
        for chain in self.ready.iter().take(count) {
            pieces.extend_from_slice(chain.writable.iovecs());
        }
        pieces.push(spill.piece());
        room
    }

    /// Gives the guest the first buffers, which hold a frame of `len` bytes, its header included.
    fn deliver(&mut self, len: usize, limiter: &mut Option<Limiter>, counters: &mut Direction) {
        let mut left = len;
        let mut count = 0;
        while let Some(chain) = self.ready.get(count) {
            let filled = left.min(chain.writable.len());
            self.used.push((chain.head(), filled));
            left -= filled;
            count += 1;
            if left == 0 {
                break;
            }
        }
        // There are at most as many as the queue has entries.
        let buffers = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        // The tap leaves this part of the header as it was; the first buffer holds all of it.
        if let Some(first) = self.ready.front() {
            first.writable.copy_in_at(NUM_BUFFERS, &buffers);
        }
        for chain in self.ready.drain(..count) {
            self.room -= chain.writable.len();
            self.spare.push(chain);
        }
        self.ring.give_back_together(self.used.drain(..));
        counters.count(len - HEADER);
        if let Some(limiter) = limiter {
            limiter.charge(len - HEADER);
        }
    }

    /// Keeps a frame that is longer than the buffers, if more of them would help.
    fn hold(&mut self, room: usize, len: usize, spill: &Spill, counters: &mut Direction) {
        if self.is_hopeless() {
            counters.drops += 1;
            return;
        }
        let mut frame = vec![0; len.min(room + spill.0.len())];
        let mut done = 0;
        let (count, _) = self.usable();
        for chain in self.ready.iter().take(count) {
            done += chain.writable.copy_out(&mut frame[done..]);
        }
        let rest = frame.len() - done;
        frame[done..].copy_from_slice(&spill.0[..rest]);
        self.held = Some(frame);
    }

    /// A frame that does not fit now never will: the guest wants it in one buffer, or has given all
    /// that the queue holds, or in too many pieces.
    fn is_hopeless(&self) -> bool {
        let all = self.ready.len() >= self.size || self.usable().0 < self.ready.len();
        !self.mergeable && !self.ready.is_empty() || all
    }

    /// Copies a frame into the buffers; returns it if it still has to wait.
    fn put(
        &mut self,
        frame: Vec<u8>,
        limiter: &mut Option<Limiter>,
        counters: &mut Direction,
    ) -> Option<Vec<u8>> {
        let (count, room) = self.usable();
        if room < frame.len() {
            if self.is_hopeless() {
                counters.drops += 1;
                return None;
            }
            return Some(frame);
        }
        let mut done = 0;
        for chain in self.ready.iter().take(count) {
            done += chain.writable.copy_in(&frame[done..]);
        }
        self.deliver(frame.len(), limiter, counters);
        None
    }
}

impl Spill {
    fn piece(&mut self) -> libc::iovec {
        libc::iovec { iov_base: self.0.as_mut_ptr().cast(), iov_len: self.0.len() }
    }
}
