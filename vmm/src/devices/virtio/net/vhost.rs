//! The kernel's own path (vhost-net): a queue pair whose frames never come to user space.
//!
//! The kernel is told where guest memory and the queues are, and gets the very descriptors that KVM
//! writes (kicks) and reads (interrupts), so that it and the guest need nobody between them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use super::features::{OF_THE_RING, bit};
use super::tap::Tap;
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::state::QueuePosition;
use crate::vm::{GuestMemory, LiveMemory, MemoryListener};

/// Receiving and sending.
const QUEUES: u32 = 2;

/// Why the kernel does not take a queue pair.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The descriptor is something else, or a call failed.
    #[error("vhost-net could not {what} (is the descriptor one of /dev/vhost-net?)")]
    Call {
        /// What it was to do.
        what: &'static str,
        /// Why it did not.
        source: vhost::Error,
    },
    /// It cannot reach the guest's memory.
    #[error("vhost-net could not take the guest's memory")]
    Memory(#[source] io::Error),
    /// Too old.
    #[error("this host's vhost-net knows no virtio 1: a Linux of 4.20 or later is needed")]
    Old,
}

/// A queue pair in the kernel.
pub struct KernelPair {
    fd: Arc<OwnedFd>,
    features: u64,
    live: Option<Live>,
}

struct Live {
    memory: LiveMemory,
    /// Follows guest memory for as long as it is there.
    _table: Arc<dyn MemoryListener>,
    queues: [ActiveQueue; 2],
    running: bool,
}

/// The kernel's table of guest memory.
struct Table {
    fd: Arc<OwnedFd>,
}

impl MemoryListener for Table {
    fn change(&self, memory: &Arc<GuestMemory>) -> io::Result<()> {
        let handle = Handle { fd: &self.fd, memory: Arc::clone(memory) };
        handle.set_mem_table(&table(memory)).map_err(io::Error::other)
    }
}

/// The regions of guest memory; those that adjoin both here and there are one, as the kernel takes
/// 64 at most.
fn table(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let mut table: Vec<VhostUserMemoryRegionInfo> = Vec::new();
    for region in memory.iter() {
        let (guest, size) = (region.start_addr().0, region.len());
        let here = region.as_ptr().addr() as u64;
        match table.last_mut() {
            Some(last)
                if last.guest_phys_addr + last.memory_size == guest
                    && last.userspace_addr + last.memory_size == here =>
            {
                last.memory_size += size;
            }
            _ => table.push(VhostUserMemoryRegionInfo {
                guest_phys_addr: guest,
                memory_size: size,
                userspace_addr: here,
                ..VhostUserMemoryRegionInfo::default()
            }),
        }
    }
    table
}

/// For the calls of the crate.
struct Handle<'a> {
    fd: &'a OwnedFd,
    memory: Arc<GuestMemory>,
}

impl AsRawFd for Handle<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Handle<'_> {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// The transport has checked size and place of the queue before it was activated.
    fn is_valid(&self, _config: &VringConfigData) -> bool {
        true
    }
}

fn call(what: &'static str) -> impl FnOnce(vhost::Error) -> VhostError {
    move |source| VhostError::Call { what, source }
}

impl KernelPair {
    /// Takes a descriptor of `/dev/vhost-net`, which from now on works in our memory.
    pub fn new(fd: OwnedFd) -> Result<Self, VhostError> {
        let handle = Handle { fd: &fd, memory: Arc::new(GuestMemory::new()) };
        handle.set_owner().map_err(call("be taken"))?;
        let features = handle.get_features().map_err(call("tell its features"))?;
        if features & bit(virtio_bindings::virtio_config::VIRTIO_F_VERSION_1) == 0 {
            return Err(VhostError::Old);
        }
        Ok(Self { fd: Arc::new(fd), features, live: None })
    }

    /// Which of the features of the ring it has.
    pub fn features(&self) -> u64 {
        self.features & OF_THE_RING
    }

    /// Gives the kernel the queues of a driver with these features; it does not run yet.
    pub fn start(
        &mut self,
        memory: &LiveMemory,
        features: u64,
        queues: [ActiveQueue; 2],
    ) -> Result<(), VhostError> {
        let handle = Handle { fd: &self.fd, memory: memory.now() };
        handle.set_features(features & self.features()).map_err(call("take the features"))?;
        let table: Arc<dyn MemoryListener> = Arc::new(Table { fd: Arc::clone(&self.fd) });
        memory.listen(&table).map_err(VhostError::Memory)?;
        for (index, active) in queues.iter().enumerate() {
            let queue = &active.queue;
            let config = VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                used_ring_addr: queue.used_ring(),
                avail_ring_addr: queue.avail_ring(),
                log_addr: None,
            };
            let failed = || call("take a queue");
            handle.set_vring_num(index, queue.size()).map_err(failed())?;
            handle.set_vring_base(index, queue.next_avail()).map_err(failed())?;
            handle.set_vring_addr(index, &config).map_err(failed())?;
            handle.set_vring_call(index, active.interrupt.event()).map_err(failed())?;
            handle.set_vring_kick(index, &active.kick).map_err(failed())?;
        }
        self.live = Some(Live { memory: memory.clone(), _table: table, queues, running: false });
        Ok(())
    }

    /// Lets frames pass, or stops them: then the kernel has finished with all memory of the guest.
    pub fn run(&mut self, tap: Option<&Tap>) -> io::Result<()> {
        let Some(live) = &mut self.live else { return Ok(()) };
        if live.running == tap.is_some() {
            return Ok(());
        }
        live.running = tap.is_some();
        for index in 0..QUEUES {
            let fd = tap.map_or(-1, Tap::as_raw_fd);
            let backend = vhost_vring_file { index, fd };
            let request = VHOST_NET_SET_BACKEND();
            // SAFETY: the request reads such a structure, and the pointer is that of one.
            let result = unsafe {
                libc::ioctl(self.fd.as_raw_fd(), request as _, std::ptr::from_ref(&backend))
            };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Takes the queues away.
    pub fn reset(&mut self) {
        // It fails for a pair that does not run only.
        let _ = self.run(None);
        self.live = None;
    }

    /// How far it has come in both queues; of one that runs, how far it had just come.
    pub fn positions(&self) -> Vec<QueuePosition> {
        let Some(live) = &self.live else { return Vec::new() };
        let memory = live.memory.now();
        let handle = Handle { fd: &self.fd, memory: Arc::clone(&memory) };
        let queues = live.queues.iter().enumerate();
        queues
            .map(|(index, active)| {
                let queue = &active.queue;
                // The kernel counts in 16 bits.
                let next_avail = handle
                    .get_vring_base(index)
                    .ok()
                    .and_then(|base| u16::try_from(base & 0xffff).ok())
                    .unwrap_or_else(|| queue.next_avail());
                // The kernel takes its place in the used ring from the ring.
                let used = GuestAddress(queue.used_ring().saturating_add(2));
                let next_used = memory.load(used, Ordering::Acquire).map(u16::from_le);
                QueuePosition { next_avail, next_used: next_used.unwrap_or(queue.next_used()) }
            })
            .collect()
    }
}
