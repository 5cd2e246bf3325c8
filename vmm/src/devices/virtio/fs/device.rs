//! The device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use event_manager::{EventOps, EventSet, Events};
use serde::{Deserialize, Serialize};
use slog::{Logger, debug, error};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::channel::{Channel, ChannelError, Progress, Segments};
use super::message::{InHeader, OUT_HEADER, OutHeader};
use crate::devices::virtio::chain::{Chain, Limits};
use crate::devices::virtio::events::QueueEvents;
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::{QueuePosition, RestoreError, SaveError, check_version};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};
use crate::fuse::{IN_HEADER, LONGEST};

/// The longest tag, in bytes.
pub const MAX_TAG: usize = 36;
/// Event data of a channel is its number plus this.
pub(super) const FIRST_TOKEN: u32 = 0x100;
/// High priority, requests. Linux makes requests no longer than the queue has entries, in pages: 512
/// leaves room for 1 MiB.
const QUEUE_SIZES: [u16; 2] = [64, 512];
const LIMITS: Limits = Limits { readable: LONGEST, writable: LONGEST };
const STATE_VERSION: u16 = 1;
/// Requests taken before others have their turn.
const ROUND: usize = 128;

/// Why there can be no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No tag, or one that is too long.
    #[error("the tag must have 1 to {MAX_TAG} bytes")]
    Tag,
    /// There must be at least one channel.
    #[error("no channels to the file server")]
    Channels,
    /// A descriptor the device works with failed.
    #[error("device descriptor")]
    Io(#[from] io::Error),
}

/// The file system device.
pub struct Fs {
    logger: Logger,
    log_limit: LogLimit,
    pub(super) events: QueueEvents,
    tag: [u8; MAX_TAG],
    rings: Option<[Ring; 2]>,
    channels: Vec<Channel>,
    /// Idle channels; the last is the one used last.
    free: Vec<usize>,
    segments: Segments,
    /// For requests that no channel can take.
    spare: Chain,
    requests: u64,
}

/// A saved [`Fs`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    version: u16,
    tag: Vec<u8>,
}

impl Fs {
    /// A device that waits for its driver, with `channels` to the file server.
    pub fn new(tag: &str, channels: Vec<OwnedFd>, logger: Logger) -> Result<Self, FsError> {
        let mut padded = [0; MAX_TAG];
        if tag.is_empty() {
            return Err(FsError::Tag);
        }
        padded.get_mut(..tag.len()).ok_or(FsError::Tag)?.copy_from_slice(tag.as_bytes());
        if channels.is_empty() {
            return Err(FsError::Channels);
        }
        Ok(Self {
            logger,
            log_limit: LogLimit::default(),
            events: QueueEvents::new()?,
            tag: padded,
            rings: None,
            free: (0..channels.len()).rev().collect(),
            channels: channels.into_iter().map(Channel::new).collect(),
            segments: Segments::default(),
            spare: Chain::default(),
            requests: 0,
        })
    }

    /// Requests carried so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// The device's own state.
    pub fn save(&self) -> Result<FsState, SaveError> {
        match self.channels.iter().filter(|channel| channel.is_busy()).count() {
            0 => Ok(FsState { version: STATE_VERSION, tag: self.tag.to_vec() }),
            busy => Err(SaveError::Busy(busy)),
        }
    }

    /// Takes a saved state, before the transport restores its own.
    pub fn restore(&mut self, state: &FsState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)?;
        if state.tag != self.tag {
            return Err(RestoreError::Mismatch("tag"));
        }
        Ok(())
    }

    /// Has the channels watched; once.
    pub(super) fn watch(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        for (index, channel) in self.channels.iter().enumerate() {
            ops.add(interest(channel.socket.as_raw_fd(), index, false))?;
        }
        Ok(())
    }

    /// Hands requests to idle channels.
    pub(super) fn serve(&mut self, ops: &mut EventOps<'_>) {
        for _ in 0..ROUND {
            let Some(index) = self.free.last().copied() else {
                // Busy channels take the queues up again; if there are none, nobody does.
                if self.channels.iter().any(|channel| !channel.is_dead()) {
                    return self.tell_guest();
                }
                if !self.refuse_next() {
                    return self.tell_guest();
                }
                continue;
            };
            let Some(rings) = &mut self.rings else { return };
            let Some(queue) = take(rings, &mut self.channels[index].chain) else {
                return self.tell_guest();
            };
            match self.check(index) {
                Ok(header) => {
                    self.free.pop();
                    self.requests += 1;
                    self.channels[index].begin(header, queue);
                    self.drive(index, ops);
                }
                Err(why) => {
                    if let Some(suppressed) = self.log_limit.allow() {
                        debug!(self.logger, "fs: bad request"; "why" => why,
                            "suppressed" => suppressed);
                    }
                    let chain = &self.channels[index].chain;
                    if let Some(rings) = &mut self.rings {
                        fail(&mut rings[queue], chain, libc::EIO, header(chain).unique);
                    }
                }
            }
        }
        self.tell_guest();
        self.events.again();
    }

    /// Something has happened on a channel.
    pub(super) fn channel_event(&mut self, index: usize, set: EventSet, ops: &mut EventOps<'_>) {
        let Some(channel) = self.channels.get(index) else { return };
        if channel.is_busy() {
            self.drive(index, ops);
        } else if !channel.is_dead()
            && set.intersects(EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR)
        {
            self.bury(index, &ChannelError::Closed, ops);
        }
    }

    /// Sends and receives on a channel, and what follows from that.
    fn drive(&mut self, index: usize, ops: &mut EventOps<'_>) {
        let channel = &mut self.channels[index];
        match channel.drive(&mut self.segments) {
            Ok(Progress::Pending) => {
                let wants_room = channel.wants_room();
                if wants_room != channel.watching_room {
                    channel.watching_room = wants_room;
                    // It is registered as long as it lives.
                    let _ = ops.modify(interest(channel.socket.as_raw_fd(), index, wants_room));
                }
            }
            Ok(Progress::Done(len)) => {
                self.free.push(index);
                if !channel.abandoned
                    && let Some(rings) = &mut self.rings
                {
                    rings[channel.queue].give_back(channel.chain.head(), len);
                }
            }
            Err(error) => self.bury(index, &error, ops),
        }
    }

    /// A channel is of no more use; its request fails.
    fn bury(&mut self, index: usize, error: &ChannelError, ops: &mut EventOps<'_>) {
        let channel = &mut self.channels[index];
        let source = std::error::Error::source(error).map(ToString::to_string);
        error!(self.logger, "fs: channel to the file server lost"; "error" => %error,
            "source" => source, "channel" => index);
        if channel.is_busy()
            && !channel.abandoned
            && let Some(rings) = &mut self.rings
        {
            let ring = &mut rings[channel.queue];
            if channel.wants_answer() {
                fail(ring, &channel.chain, libc::EIO, channel.unique());
            } else {
                ring.give_back(channel.chain.head(), 0);
            }
        }
        self.free.retain(|&free| free != index);
        let channel = &mut self.channels[index];
        channel.bury();
        let _ = ops.remove(Events::empty(&channel.socket));
    }

    /// Refuses the next request, for want of channels; `false` if there is none.
    fn refuse_next(&mut self) -> bool {
        let Some(rings) = &mut self.rings else { return false };
        let Some(queue) = take(rings, &mut self.spare) else { return false };
        let header = header(&self.spare);
        if header.wants_answer() {
            fail(&mut rings[queue], &self.spare, libc::ENOTCONN, header.unique);
        } else {
            rings[queue].give_back(self.spare.head(), 0);
        }
        true
    }

    /// Copies the header of the request just taken for a channel and checks the frame.
    fn check(&self, index: usize) -> Result<[u8; IN_HEADER], &'static str> {
        let chain = &self.channels[index].chain;
        let mut bytes = [0; IN_HEADER];
        if chain.readable.copy_out(&mut bytes) != IN_HEADER {
            return Err("shorter than its header");
        }
        let header = InHeader::decode(&bytes);
        if usize::try_from(header.len) != Ok(chain.readable.len()) {
            return Err("of another length than it says");
        }
        if header.wants_answer() && chain.writable.len() < OUT_HEADER {
            return Err("no room for the answer");
        }
        Ok(bytes)
    }

    fn tell_guest(&mut self) {
        for ring in self.rings.iter_mut().flatten() {
            if let Err(error) = ring.tell_guest() {
                error!(self.logger, "fs: cannot interrupt the guest"; "error" => %error);
            }
        }
    }

    pub(super) fn logger(&self) -> &Logger {
        &self.logger
    }
}

/// Takes the next request, of high priority first; says which queue it is from. Bad chains have
/// been given back.
fn take(rings: &mut [Ring; 2], chain: &mut Chain) -> Option<usize> {
    for _ in 0..ROUND {
        let mut empty = true;
        for (queue, ring) in rings.iter_mut().enumerate() {
            match ring.pop(chain, LIMITS) {
                Some(Ok(())) => return Some(queue),
                Some(Err(_)) => empty = false,
                None => {}
            }
        }
        if !empty {
            continue;
        }
        // Both are asked, so that both will kick.
        let [priority, request] = rings;
        let more = [priority.ask_for_kicks(), request.ask_for_kicks()];
        if more == [false, false] {
            return None;
        }
    }
    None
}

/// A copy of the request's header; what is missing of it is zero.
fn header(chain: &Chain) -> InHeader {
    let mut bytes = [0; IN_HEADER];
    chain.readable.copy_out(&mut bytes);
    InHeader::decode(&bytes)
}

/// Answers a request with an error, as far as there is room for an answer.
fn fail(ring: &mut Ring, chain: &Chain, errno: i32, unique: u64) {
    let answer = OutHeader::failure(errno, unique).encode();
    let room = chain.writable.len() >= OUT_HEADER;
    let len = if room { chain.writable.copy_in(&answer) } else { 0 };
    ring.give_back(chain.head(), len);
}

fn interest(fd: RawFd, index: usize, room: bool) -> Events {
    let mut set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room {
        set |= EventSet::OUT;
    }
    // There are a handful of channels.
    let token = u32::try_from(index).map_or(u32::MAX - 1, |index| FIRST_TOKEN + index);
    Events::with_data_raw(fd, token, set)
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // The tag, and the number of request queues.
        let config = self.tag.iter().copied().chain(1_u32.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(config.skip(start)) {
            *byte = value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [(priority, priority_kick), (request, request_kick)] = activation.rings()?;
        self.rings = Some([priority, request]);
        self.events.arm([priority_kick, request_kick])?;
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = None;
        for channel in &mut self.channels {
            channel.abandoned = true;
        }
        self.events.disarm();
    }

    fn positions(&self) -> Vec<QueuePosition> {
        self.rings.iter().flatten().map(Ring::position).collect()
    }
}
