//! The device in the event loop.

use event_manager::{EventOps, Events, MutEventSubscriber};
use slog::error;

use super::Vsock;
use super::mux::FIRST_TOKEN;
use crate::devices::virtio::events::CHANGED;

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.events.init(ops) {
            error!(self.logger(), "vsock: not in the event loop"; "error" => %error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CHANGED => {
                if let Err(error) = self.events.process(ops) {
                    error!(self.logger(), "vsock: not in the event loop"; "error" => %error);
                }
                self.sweep(ops);
            }
            token if token >= FIRST_TOKEN => {
                let slot = token - FIRST_TOKEN;
                self.mux.socket_event(slot, events.fd(), events.event_set(), ops);
            }
            _ => {}
        }
        self.serve(ops);
    }
}
