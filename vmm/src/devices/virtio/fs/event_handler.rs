//! The device in the event loop.

use event_manager::{EventOps, Events, MutEventSubscriber};
use slog::error;

use super::Fs;
use super::device::FIRST_TOKEN;
use crate::devices::virtio::events::CHANGED;

impl MutEventSubscriber for Fs {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.events.init(ops).and_then(|()| self.watch(ops)) {
            error!(self.logger(), "fs: not in the event loop"; "error" => %error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CHANGED => {
                if let Err(error) = self.events.process(ops) {
                    error!(self.logger(), "fs: not in the event loop"; "error" => %error);
                }
            }
            token if token >= FIRST_TOKEN => {
                // Lossless: usize has at least 32 bits.
                self.channel_event((token - FIRST_TOKEN) as usize, events.event_set(), ops);
            }
            _ => {}
        }
        self.serve(ops);
    }
}
