//! The vhost-user border: a front end hands over its guest's memory and the device's queues.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, PoisonError, RwLock};

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::FilesError;
use super::tree::Tree;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The queue of forgets and interrupts, and one of requests.
const QUEUES: usize = 2;

/// Descriptors in a queue at most.
const QUEUE_SIZE: usize = 1024;

/// Serves the one front end that connects to the listening `socket`, until it goes.
pub fn serve(socket: OwnedFd, device: Device) -> Result<(), FilesError> {
    let fail = |error: vhost_user_backend::Error| FilesError::VhostUser(error.to_string());
    let mut listener = Listener::from(UnixListener::from(socket));
    let memory = Memory::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("files-vhost".to_owned(), Arc::new(device), memory).map_err(fail)?;
    daemon.start(&mut listener).map_err(fail)?;
    daemon.wait().map_err(fail)
}

/// A virtio-fs device.
pub struct Device {
    server: Arc<Server<&'static Tree>>,
    tree: &'static Tree,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    memory: Option<Memory>,
    event_index: bool,
}

impl Device {
    /// Over the tree that `server` serves.
    pub fn new(server: Arc<Server<&'static Tree>>, tree: &'static Tree) -> Self {
        Self { server, tree, state: RwLock::new(State::default()) }
    }

    /// Answers every request in the queue; whether there were any.
    fn drain(&self, memory: &Memory, ring: &VringMutex) -> io::Result<bool> {
        let mut any = false;
        loop {
            let guest = memory.memory();
            let chain = ring
                .get_mut()
                .get_queue_mut()
                .iter(guest.clone())
                .map_err(io::Error::other)?
                .next();
            let Some(chain) = chain else { return Ok(any) };
            any = true;
            let head = chain.head_index();
            // Chains are checked against guest memory as they are taken apart. One that makes no
            // sense, or a message in it, is given back unanswered.
            let written = Reader::from_descriptor_chain(&*guest, chain.clone())
                .and_then(|reader| Ok((reader, VirtioFsWriter::new(&*guest, chain)?)))
                .ok()
                .and_then(|(reader, writer)| {
                    self.server.handle_message(reader, Writer::VirtioFs(writer), None, None).ok()
                })
                .unwrap_or(0);
            ring.add_used(head, u32::try_from(written).unwrap_or(0)).map_err(io::Error::other)?;
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, enabled: bool) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).event_index = enabled;
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.state.write().unwrap_or_else(PoisonError::into_inner).memory = Some(memory);
        Ok(())
    }

    fn handle_event(
        &self,
        queue: u16,
        events: EventSet,
        rings: &[VringMutex],
        _: usize,
    ) -> io::Result<()> {
        self.tree.prepare_thread()?;
        let (memory, event_index) = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            (state.memory.clone(), state.event_index)
        };
        let (Some(ring), Some(memory)) = (rings.get(usize::from(queue)), memory) else {
            return Ok(());
        };
        if events != EventSet::IN {
            return Ok(());
        }
        loop {
            if event_index {
                ring.disable_notification().map_err(io::Error::other)?;
            }
            let any = self.drain(&memory, ring)?;
            if any && ring.needs_notification().map_err(io::Error::other)? {
                ring.signal_used_queue()?;
            }
            // Requests may have come between the last look and this.
            if !event_index || !ring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
