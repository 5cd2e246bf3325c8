//! The device in the event loop.

use event_manager::{EventOps, Events, MutEventSubscriber};
use slog::error;

use super::Mem;
use crate::devices::virtio::events::CHANGED;

impl MutEventSubscriber for Mem {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.events.init(ops) {
            error!(self.logger(), "mem: not in the event loop"; "error" => %error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == CHANGED
            && let Err(error) = self.events.process(ops)
        {
            error!(self.logger(), "mem: not in the event loop"; "error" => %error);
        }
        self.serve();
    }
}
