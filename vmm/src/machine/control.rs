//! The control socket while the machine runs.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use husk_control::{
    EndReason, Event, MachineMessage, MachineRequest, Packet, PacketError, Reply, Request, receive,
    send,
};
use slog::{Logger, debug, error, warn};

use super::{EndSignal, Machine, NetworkParts, chain};
use crate::devices::virtio::vsock::Listener;

const REQUESTS: u32 = 0;
const END: u32 = 1;

/// The socket to the shim, shared by all who have something to say.
pub struct Control {
    socket: OwnedFd,
    logger: Logger,
}

impl Control {
    /// The socket the process was started with.
    pub fn new(socket: OwnedFd, logger: Logger) -> Self {
        Self { socket, logger }
    }

    /// Waits for the next request; `None` when the shim has closed the socket.
    pub fn next(&self) -> Result<Option<Packet<Request>>, PacketError> {
        receive(&self.socket)
    }

    /// Answers a request. Who cannot be told is gone, and the socket's end is seen elsewhere.
    pub fn reply(&self, id: u64, result: Result<Reply, String>, with: &[BorrowedFd<'_>]) {
        self.send(&MachineMessage::Reply { id, result }, with);
    }

    /// Tells of something that happened.
    pub fn event(&self, event: Event, with: &[BorrowedFd<'_>]) {
        self.send(&MachineMessage::Event(event), with);
    }

    /// Takes no more requests and drops those not read yet: a socket closed over unread packets
    /// would fail the shim's next `recvmsg` (ECONNRESET) before it has read our last word.
    pub fn finish(&self) {
        // SAFETY: a call with plain numbers on a descriptor owned by `self`.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RD) };
        while let Ok(Some(_)) | Err(PacketError::Json(_) | PacketError::TooLarge) = self.next() {}
    }

    fn send(&self, message: &MachineMessage, with: &[BorrowedFd<'_>]) {
        if let Err(error) = send(&self.socket, message, with) {
            warn!(self.logger, "control: not sent"; "error" => %error);
        }
    }
}

/// Requests for a machine that runs.
pub(super) struct ControlHandler {
    control: Arc<Control>,
    machine: Rc<Machine>,
    end: Arc<EndSignal>,
    logger: Logger,
}

impl ControlHandler {
    /// Serves `machine` over `control`.
    pub(super) fn new(
        control: Arc<Control>,
        machine: Rc<Machine>,
        end: Arc<EndSignal>,
        logger: Logger,
    ) -> Self {
        Self { control, machine, end, logger }
    }

    /// Takes one request; false when there will be no more.
    fn serve_next(&mut self) -> bool {
        match self.control.next() {
            Ok(Some(mut packet)) => {
                let Request { id, request } = packet.message.clone();
                debug!(self.logger, "control: request"; "id" => id, "request" => ?request);
                if let Some(result) = self.serve(id, request, &mut packet) {
                    self.control.reply(id, result, &[]);
                }
                return true;
            }
            Ok(None) => {
                debug!(self.logger, "control: closed by the shim");
                self.end.end(EndReason::Failed { error: "the shim is gone".to_owned() });
            }
            Err(PacketError::Socket(errno)) => {
                error!(self.logger, "control: socket failed"; "error" => %errno);
                self.end.end(EndReason::Failed { error: format!("control socket: {errno}") });
            }
            // Not understood: there is no number to answer to.
            Err(error) => {
                warn!(self.logger, "control: request refused"; "error" => %error);
                return true;
            }
        }
        false
    }

    /// The answer, unless it comes later.
    fn serve(
        &mut self,
        id: u64,
        request: MachineRequest,
        packet: &mut Packet<Request>,
    ) -> Option<Result<Reply, String>> {
        let done = |()| Reply::Done;
        Some(match request {
            MachineRequest::Boot(_) => Err("the machine has been booted already".to_owned()),
            MachineRequest::Listen { port } => {
                self.machine.vsock().listen(port, Listener::pairs());
                Ok(Reply::Done)
            }
            MachineRequest::Accept { port, from, stream } => {
                let taken = packet.take(stream).map_err(chain);
                let listener = taken.map(|stream| Listener::over(stream, from));
                listener.map(|listener| self.machine.vsock().listen(port, listener)).map(done)
            }
            MachineRequest::Unlisten { port } => {
                self.machine.vsock().unlisten(port);
                Ok(Reply::Done)
            }
            MachineRequest::Connect { port } => match self.machine.vsock().connect(port, id) {
                Ok(()) => return None,
                Err(error) => Err(chain(error)),
            },
            MachineRequest::Pause => self.machine.pause().map(done).map_err(chain),
            MachineRequest::Resume => self.machine.resume().map(done).map_err(chain),
            MachineRequest::Metrics => Ok(Reply::Metrics(self.machine.metrics())),
            MachineRequest::EnsureVcpus { count } => {
                self.machine.ensure_vcpus(count).map(done).map_err(chain)
            }
            MachineRequest::ResizeMemory { mib } => {
                self.machine.resize_memory(mib).map(Reply::Memory).map_err(chain)
            }
            MachineRequest::AwaitMemory => Ok(Reply::Memory(self.machine.await_memory(id)?)),
            MachineRequest::AddNetwork(device) => {
                let parts = NetworkParts::take(packet, &device).map_err(chain);
                parts.and_then(|parts| self.machine.add_network(parts).map(done).map_err(chain))
            }
            MachineRequest::RemoveNetwork { id } => {
                self.machine.remove_network(&id).map(done).map_err(chain)
            }
            MachineRequest::SetLink { id, up } => {
                self.machine.set_link(&id, up).map(done).map_err(chain)
            }
            MachineRequest::ExpectEnd => {
                self.end.expect();
                Ok(Reply::Done)
            }
        })
    }
}

impl MutEventSubscriber for ControlHandler {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == END {
            // Read, so that the loop can go on until the last bytes are delivered.
            let _ = self.end.event().read();
        } else if !self.serve_next()
            && let Err(error) = ops.remove(events)
        {
            error!(self.logger, "control: event loop"; "error" => %error);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let socket = self.control.socket.as_raw_fd();
        let requests = Events::with_data_raw(socket, REQUESTS, EventSet::IN);
        let end = Events::with_data(self.end.event(), END, EventSet::IN);
        for events in [requests, end] {
            if let Err(error) = ops.add(events) {
                self.end.end(EndReason::Failed { error: format!("event loop: {error}") });
            }
        }
    }
}
