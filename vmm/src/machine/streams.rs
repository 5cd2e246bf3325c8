//! Streams of the guest's on their way to the shim.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use husk_control::{Event, Reply};

use super::chain;
use super::control::Control;
use crate::devices::virtio::vsock::{ConnectError, StreamSink};

/// Hands streams to the shim over the control socket.
pub(super) struct ControlStreams {
    control: Arc<Control>,
}

impl ControlStreams {
    /// Streams for the shim behind `control`.
    pub(super) fn new(control: Arc<Control>) -> Self {
        Self { control }
    }
}

impl StreamSink for ControlStreams {
    fn connection(&mut self, port: u32, stream: Option<OwnedFd>) {
        let with: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
        self.control.event(Event::Connection { port }, &with);
    }

    fn connected(&mut self, request: u64, result: Result<OwnedFd, ConnectError>) {
        match result {
            Ok(stream) => self.control.reply(request, Ok(Reply::Connected), &[stream.as_fd()]),
            Err(error) => self.control.reply(request, Err(chain(error)), &[]),
        }
    }
}
