//! Frames from the guest: from buffers of one queue straight to the tap.

use std::io;
use std::sync::Arc;

use super::Turn;
use super::header::{self, ETHERNET, HEADER, LONGEST};
use super::limiter::Limiter;
use super::metrics::Direction;
use super::tap::Tap;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::QueuePosition;
use crate::vm::LiveMemory;

const LIMITS: Limits = Limits { readable: LONGEST, writable: 0 };
/// Chains before others have their turn.
const ROUND: usize = 256;
/// Frames after which the guest is told of them while there are more.
const BATCH: usize = 64;

/// The sending side of a queue pair.
pub struct Sender {
    ring: Ring,
    features: u64,
    chain: Chain,
}

/// What became of a frame.
enum Fate {
    Sent(usize),
    Dropped(&'static str),
    /// The tap has no room now.
    Waits,
}

impl Sender {
    /// On a queue that has been activated, for a driver with these features.
    pub fn new(queue: ActiveQueue, memory: &Arc<LiveMemory>, features: u64) -> Self {
        Self {
            ring: Ring::new(queue.queue, queue.interrupt, Arc::clone(memory)),
            features,
            chain: Chain::default(),
        }
    }

    /// Where it stands.
    pub fn position(&self) -> QueuePosition {
        self.ring.position()
    }

    /// Sends the guest's frames, at most [`ROUND`]; without a tap they are dropped. `dropped` hears
    /// why one was.
    pub fn run(
        &mut self,
        tap: Option<&Tap>,
        limiter: &mut Option<Limiter>,
        counters: &mut Direction,
        mut dropped: impl FnMut(&str),
    ) -> io::Result<Turn> {
        let mut pieces = Vec::new();
        self.ring.decline_kicks();
        for round in 1..=ROUND {
            if limiter.as_mut().is_some_and(|limiter| !limiter.is_open()) {
                return self.rest(Turn::Limited);
            }
            match self.ring.pop(&mut self.chain, LIMITS) {
                None if self.ring.ask_for_kicks() => continue,
                None => return self.rest(Turn::Idle),
                // It has been given back.
                Some(Err(error)) => {
                    counters.drops += 1;
                    dropped(&error.to_string());
                    continue;
                }
                Some(Ok(())) => {}
            }
            match self.send(tap, &mut pieces) {
                Fate::Sent(len) => {
                    counters.count(len);
                    if let Some(limiter) = limiter {
                        limiter.charge(len);
                    }
                }
                Fate::Dropped(why) => {
                    counters.drops += 1;
                    dropped(why);
                }
                Fate::Waits => {
                    self.ring.unpop(1);
                    return self.rest(Turn::Blocked);
                }
            }
            self.ring.give_back(self.chain.head(), 0);
            if round % BATCH == 0 {
                self.ring.tell_guest()?;
            }
        }
        self.rest(Turn::More)
    }

    fn rest(&mut self, turn: Turn) -> io::Result<Turn> {
        self.ring.tell_guest()?;
        Ok(turn)
    }

    /// Sends the frame in the chain.
    fn send(&mut self, tap: Option<&Tap>, pieces: &mut Vec<libc::iovec>) -> Fate {
        let frame = &mut self.chain.readable;
        // LIMITS lets nothing writable pass but pieces of no bytes.
        if frame.len() < HEADER + ETHERNET {
            return Fate::Dropped("shorter than its headers");
        }
        let Some(tap) = tap else { return Fate::Dropped("the link is down") };
        let mut bytes = [0; HEADER];
        frame.copy_out(&mut bytes);
        frame.advance(HEADER);
        let mut checked = match header::check(bytes, frame.len(), self.features) {
            Ok(checked) => checked,
            Err(why) => return Fate::Dropped(why),
        };
        pieces.clear();
        pieces.push(libc::iovec { iov_base: checked.as_mut_ptr().cast(), iov_len: HEADER });
        // A chain has at most 1000 segments: with the header fewer than the kernel's 1024.
        pieces.extend_from_slice(frame.iovecs());
        // SAFETY: the pieces are `checked` and segments of guest memory, which the chain keeps
        // mapped. The guest may change them meanwhile, which only changes what is sent.
        match unsafe { tap.write(pieces) } {
            Ok(Some(_)) => Fate::Sent(frame.len()),
            Ok(None) => Fate::Waits,
            Err(_) => Fate::Dropped("the tap does not take it"),
        }
    }
}
