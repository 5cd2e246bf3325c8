//! Packets to the guest.

use event_manager::EventOps;
use slog::{Logger, error};

use super::mux::Mux;
use super::packet::{HEADER, Header, op};
use crate::devices::virtio::chain::{Chain, Limits, MAX_SEGMENTS};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::socket;

/// Receive buffers may be this large; drivers use 4 KiB.
const LIMITS: Limits = Limits { readable: 0, writable: HEADER + 1024 * 1024 };
/// Packets filled by one system call, at most.
const BURST: usize = 16;
/// Turns before other devices have theirs.
const ROUND: usize = 64;
/// Bad buffers passed over in search of a good one.
const MAX_BAD: usize = 64;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Done,
    /// The guest has no receive buffers; it will kick.
    Starved,
}

/// Receive buffers in hand, and what to read into.
#[derive(Default)]
pub struct Buffers {
    chains: Vec<Chain>,
    /// How many of them hold a buffer.
    held: usize,
    data: Vec<libc::iovec>,
}

// SAFETY: the pointers go into guest memory, which any thread may touch; the list is built, used and
// forgotten within one turn, in which `chains` keep the memory mapped.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Takes one more buffer of the guest's in hand; `false` if there is none.
    fn take(&mut self, rx: &mut Ring) -> bool {
        if self.chains.len() == self.held {
            self.chains.push(Chain::default());
        }
        for _ in 0..MAX_BAD {
            let chain = &mut self.chains[self.held];
            match rx.pop_any(chain, LIMITS) {
                None => return false,
                Some(Ok(())) if chain.writable.len() > HEADER => {
                    self.held += 1;
                    return true;
                }
                // It must stay behind those in hand, which may yet be put back.
                Some(_) if self.held > 0 => {
                    rx.unpop(1);
                    return false;
                }
                Some(_) => rx.give_back(chain.head(), 0),
            }
        }
        false
    }

    /// Sends a packet in buffer `at` of those in hand, with `len` bytes of data already there.
    fn send(&mut self, rx: &mut Ring, at: usize, header: &Header, len: usize) {
        let chain = &self.chains[at];
        chain.writable.copy_in(&header.encode());
        rx.give_back(chain.head(), HEADER + len);
    }

    /// Gives the buffers in hand but for the first `used` back to the queue, to be taken again.
    fn put_back(&mut self, rx: &mut Ring, used: usize) {
        rx.unpop(self.held - used);
        self.held = 0;
        self.data.clear();
    }

    /// Room for data behind the headers of all buffers in hand, up to `limit` bytes.
    fn lay_out(&mut self, limit: usize) -> usize {
        self.data.clear();
        let mut total = 0;
        for chain in &self.chains[..self.held] {
            let mut skip = HEADER;
            for iovec in chain.writable.iovecs() {
                let skipped = skip.min(iovec.iov_len);
                skip -= skipped;
                let len = (iovec.iov_len - skipped).min(limit - total);
                if self.data.len() == MAX_SEGMENTS {
                    return total;
                }
                if len > 0 {
                    let base = iovec.iov_base.cast::<u8>().wrapping_add(skipped).cast();
                    self.data.push(libc::iovec { iov_base: base, iov_len: len });
                    total += len;
                }
            }
        }
        total
    }
}

impl Mux {
    /// Sends what waits, as far as the guest has buffers; `true` if a round was not enough.
    pub fn send_packets(
        &mut self,
        rx: &mut Ring,
        buffers: &mut Buffers,
        ops: &mut EventOps<'_>,
        logger: &Logger,
    ) -> bool {
        for _ in 0..ROUND {
            let turn = if let Some(reset) = self.resets.front() {
                if buffers.take(rx) {
                    buffers.send(rx, 0, reset, 0);
                    buffers.put_back(rx, 1);
                    self.resets.pop_front();
                    Turn::Done
                } else {
                    Turn::Starved
                }
            } else if let Some(slot) = self.ready.pop_front() {
                self.turn(slot, rx, buffers, ops)
            } else {
                return false;
            };
            if let Err(error) = rx.tell_guest() {
                error!(logger, "vsock: cannot interrupt the guest"; "error" => %error);
            }
            if turn == Turn::Starved && !rx.ask_for_kicks() {
                return false;
            }
        }
        true
    }

    /// One connection's turn.
    fn turn(
        &mut self,
        slot: u32,
        rx: &mut Ring,
        buffers: &mut Buffers,
        ops: &mut EventOps<'_>,
    ) -> Turn {
        // The slot may have been freed, or given to another that is not in the list.
        let Some(connection) = self.get(slot).filter(|connection| connection.queued) else {
            return Turn::Done;
        };
        connection.queued = false;
        let turn = self.tell_all(slot, rx, buffers);
        let turn = if turn == Turn::Done { self.read_burst(slot, rx, buffers) } else { turn };
        if turn == Turn::Starved
            && let Some(connection) = self.get(slot)
        {
            // First in line when buffers come.
            connection.queued = true;
            self.ready.push_front(slot);
        }
        self.settle(slot, ops);
        turn
    }

    /// Everything there is to tell, data apart.
    fn tell_all(&mut self, slot: u32, rx: &mut Ring, buffers: &mut Buffers) -> Turn {
        let Some(connection) = self.get(slot) else { return Turn::Done };
        while let Some(tell) = connection.next_tell() {
            if !buffers.take(rx) {
                return Turn::Starved;
            }
            let header = connection.header(tell.op, tell.flags, 0);
            buffers.send(rx, 0, &header, 0);
            buffers.put_back(rx, 1);
            connection.told(tell);
        }
        Turn::Done
    }

    /// Reads from the socket straight into as many buffers as it last took.
    fn read_burst(&mut self, slot: u32, rx: &mut Ring, buffers: &mut Buffers) -> Turn {
        let Some(connection) = self.get(slot) else { return Turn::Done };
        let room = usize::try_from(connection.credit.room()).unwrap_or(usize::MAX);
        if !connection.may_read() || room == 0 {
            return Turn::Done;
        }
        while buffers.held < connection.burst && buffers.take(rx) {}
        if buffers.held == 0 {
            return Turn::Starved;
        }
        let wanted = buffers.lay_out(room);
        let Some(host) = &connection.socket else {
            buffers.put_back(rx, 0);
            return Turn::Done;
        };
        // SAFETY: the segments lie in guest memory, which the chains in hand keep mapped; nothing
        // here relies on what is in there.
        let got = match unsafe { socket::receive(host, &buffers.data) } {
            Ok(Some(0)) => {
                connection.host_sent_all = true;
                0
            }
            Ok(Some(count)) => count,
            Ok(None) => {
                connection.readable = false;
                0
            }
            Err(error) => {
                connection.host_sent_all = true;
                connection.lose_host(&error);
                0
            }
        };
        if got < wanted {
            connection.burst = 1;
            // Less than asked for means that the socket is empty. Whatever comes later is a new
            // event, unless the end has been announced already.
            connection.readable &= connection.hung_up;
        } else {
            connection.burst = (connection.burst * 2).min(BURST);
        }
        let (mut left, mut used) = (got, 0);
        while left > 0 && used < buffers.held {
            let len = left.min(buffers.chains[used].writable.len() - HEADER);
            // Bounded by the buffer's limit.
            let short = u32::try_from(len).unwrap_or(u32::MAX);
            connection.credit.send(short);
            let header = connection.header(op::RW, 0, short);
            buffers.send(rx, used, &header, len);
            left -= len;
            used += 1;
        }
        buffers.put_back(rx, used);
        self.counters.to_guest += u64::try_from(got).unwrap_or(0);
        Turn::Done
    }
}
