//! The device in the event loop.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use slog::error;

use super::receive::Receiver;
use super::{Net, Turn};
use crate::devices::virtio::events::CHANGED;

/// Event data of a tap is its number plus this; kicks have smaller ones.
const FIRST_TAP: u32 = 0x100;
const RECEIVE_TIMER: u32 = 0x200;
const SEND_TIMER: u32 = 0x201;

impl Net {
    /// Hands frames to the guest through one pair.
    fn receive(&mut self, index: usize) {
        // A queue that the driver does not use gets no frames from the tap.
        if self.is_paused() || index >= self.pairs_in_use() {
            return;
        }
        let open = self.is_open();
        let Some(pair) = self.pairs.get_mut(index) else { return };
        let (tap, counters) = (&self.taps[index], &mut self.counters.received);
        let result = if open {
            pair.receiver.run(tap, &mut self.receive_limiter, &mut self.spill, counters)
        } else {
            Receiver::discard(tap, &mut self.spill, counters)
        };
        match result {
            Ok(Turn::More) => self.events.again(),
            Ok(Turn::Idle | Turn::Limited | Turn::Blocked) => {}
            // The tap is gone, or the guest's interrupt: either way it goes on when there is news.
            Err(error) => self.complain(&error.to_string()),
        }
    }

    /// Sends what the guest has for one pair.
    fn send(&mut self, index: usize, ops: &mut EventOps<'_>) {
        if self.is_paused() {
            return;
        }
        let open = self.is_open();
        let (logger, log_limit) = (&self.logger, &mut self.log_limit);
        let Some(pair) = self.pairs.get_mut(index) else { return };
        let tap = &self.taps[index];
        let target = open.then_some(tap);
        let counters = &mut self.counters.sent;
        let result = pair.sender.run(target, &mut self.send_limiter, counters, |why| {
            if let Some(suppressed) = log_limit.allow() {
                slog::debug!(logger, "net: frame dropped"; "why" => why,
                    "suppressed" => suppressed);
            }
        });
        let blocked = matches!(result, Ok(Turn::Blocked));
        if blocked != self.blocked[index] {
            self.blocked[index] = blocked;
            // It is registered as long as the device is in the event loop.
            let _ = ops.modify(interest(tap, index, blocked));
        }
        match result {
            Ok(Turn::More) => self.events.again(),
            Ok(Turn::Idle | Turn::Limited | Turn::Blocked) => {}
            Err(error) => self.complain(&error.to_string()),
        }
    }

    fn receive_all(&mut self) {
        for index in 0..self.pairs.len() {
            self.receive(index);
        }
    }

    fn send_all(&mut self, ops: &mut EventOps<'_>) {
        for index in 0..self.pairs.len() {
            self.send(index, ops);
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        self.events.init(ops)?;
        if self.is_in_kernel() {
            return Ok(());
        }
        for (index, tap) in self.taps.iter().enumerate() {
            ops.add(interest(tap, index, false))?;
        }
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (limiter, token) in
            [(&self.receive_limiter, RECEIVE_TIMER), (&self.send_limiter, SEND_TIMER)]
        {
            if let Some(timer) = limiter {
                ops.add(Events::with_data(timer, token, set))?;
            }
        }
        Ok(())
    }
}

fn interest(tap: &impl AsRawFd, index: usize, room: bool) -> Events {
    let mut set = EventSet::IN | EventSet::EDGE_TRIGGERED;
    if room {
        set |= EventSet::OUT;
    }
    // There are a handful of taps.
    let token = u32::try_from(index).map_or(CHANGED - 1, |index| FIRST_TAP + index);
    Events::with_data(tap, token, set)
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch(ops) {
            error!(self.logger, "net: not in the event loop"; "error" => %error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let token = events.data();
        // Lossless: usize has at least 32 bits.
        let number = token as usize;
        match token {
            CHANGED => {
                if let Err(error) = self.events.process(ops) {
                    error!(self.logger, "net: not in the event loop"; "error" => %error);
                }
                self.serve_control();
                self.send_all(ops);
                self.receive_all();
            }
            RECEIVE_TIMER => self.receive_all(),
            SEND_TIMER => self.send_all(ops),
            FIRST_TAP.. => {
                let index = number - FIRST_TAP as usize;
                let blocked = self.blocked.get(index).is_some_and(|blocked| *blocked);
                if blocked && events.event_set().contains(EventSet::OUT) {
                    self.send(index, ops);
                }
                if events.event_set().contains(EventSet::IN) {
                    self.receive(index);
                }
            }
            _ if number == self.control_kick() => self.serve_control(),
            _ if number.is_multiple_of(2) => self.receive(number / 2),
            _ => self.send(number / 2, ops),
        }
    }
}
