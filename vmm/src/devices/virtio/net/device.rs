//! The device.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use husk_control::RateLimit;
use slog::{Logger, debug, error, info};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_S_LINK_UP,
};

use super::control::{self, Command, is_unicast};
use super::features::{OF_THE_RING, guest_offloads, has, offered, tap_flags};
use super::limiter::{LimitError, Limiter};
use super::metrics::Counters;
use super::receive::{Receiver, Spill};
use super::send::Sender;
use super::state::{DriverState, NetState, STATE_VERSION};
use super::tap::{Tap, TapError};
use super::vhost::{KernelPair, VhostError};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::events::QueueEvents;
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::state::{QueuePosition, RestoreError, check_version};
use crate::devices::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// The most queue pairs: as many as a machine has vCPUs at most.
pub const MAX_PAIRS: usize = 32;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Commands answered before others have their turn.
const CONTROL_ROUND: usize = 16;
/// The least MTU that IPv4 can do with (RFC 791).
const LEAST_MTU: u16 = 68;

/// What a device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// One tap descriptor per queue pair.
    pub taps: Vec<OwnedFd>,
    /// One descriptor of `/dev/vhost-net` per queue pair, or none.
    pub vhost: Vec<OwnedFd>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet, if the guest is to be told.
    pub mtu: Option<u16>,
    /// What the guest may receive.
    pub receive_limit: Option<RateLimit>,
    /// What the guest may send.
    pub send_limit: Option<RateLimit>,
}

/// Why there can be no device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// None or too many.
    #[error("a network device has 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(usize),
    /// Some have one and some not.
    #[error("{vhost} descriptors of /dev/vhost-net came for {pairs} queue pairs")]
    Vhosts {
        /// How many came.
        vhost: usize,
        /// How many are needed.
        pairs: usize,
    },
    /// An address of several devices, or none.
    #[error("a hardware address of one device is needed, not one of a group or all zeroes")]
    Mac,
    /// Too small.
    #[error("an MTU is at least {LEAST_MTU}, not {0}")]
    Mtu(u16),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// vhost-net.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// A limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A descriptor the device works with failed.
    #[error("device descriptor")]
    Io(#[from] io::Error),
}

/// A queue pair in user space.
pub(super) struct Pair {
    pub(super) receiver: Receiver,
    pub(super) sender: Sender,
}

/// The network device.
pub struct Net {
    pub(super) logger: Logger,
    pub(super) log_limit: LogLimit,
    pub(super) events: QueueEvents,
    queue_sizes: Vec<u16>,
    offered: u64,
    pub(super) taps: Vec<Tap>,
    /// Taps without room: the event loop watches for it.
    pub(super) blocked: Vec<bool>,
    /// One per queue pair if frames take the kernel's path, otherwise none.
    kernel: Vec<KernelPair>,
    mac: [u8; 6],
    mtu: Option<u16>,
    link_up: bool,
    paused: bool,
    pub(super) spill: Spill,
    pub(super) receive_limiter: Option<Limiter>,
    pub(super) send_limiter: Option<Limiter>,
    pub(super) counters: Counters,
    /// The features agreed on with the driver.
    agreed: u64,
    driver: Option<DriverState>,
    /// In user space, while the driver is ready.
    pub(super) pairs: Vec<Pair>,
    control: Option<Ring>,
    chain: Chain,
    /// To be taken up by the next driver.
    restored: Option<DriverState>,
}

impl Net {
    /// A device that waits for its driver.
    pub fn new(config: NetConfig, logger: Logger) -> Result<Self, NetError> {
        let pairs = config.taps.len();
        if pairs == 0 || pairs > MAX_PAIRS {
            return Err(NetError::Pairs(pairs));
        }
        let open = |fd| Tap::new(fd, pairs > 1);
        let taps = config.taps.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        Self::over(taps, NetConfig { taps: Vec::new(), ..config }, logger)
    }

    /// A device over taps, or what stands in for them.
    pub fn over(taps: Vec<Tap>, config: NetConfig, logger: Logger) -> Result<Self, NetError> {
        let pairs = taps.len();
        let NetConfig { mut vhost, mac, mtu, receive_limit, send_limit, .. } = config;
        if !vhost.is_empty() && vhost.len() != pairs {
            return Err(NetError::Vhosts { vhost: vhost.len(), pairs });
        }
        if !is_unicast(mac) {
            return Err(NetError::Mac);
        }
        if let Some(mtu) = mtu.filter(|&mtu| mtu < LEAST_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let limit = |limit: Option<RateLimit>| limit.as_ref().map(Limiter::new).transpose();
        let (receive_limiter, send_limiter) = (limit(receive_limit)?, limit(send_limit)?);
        if !vhost.is_empty() && (receive_limiter.is_some() || send_limiter.is_some()) {
            info!(logger, "net: rate limits keep frames in user space");
            vhost.clear();
        }
        let kernel = vhost.into_iter().map(KernelPair::new).collect::<Result<Vec<_>, _>>()?;
        let mut all = offered(taps[0].has_udp_segments(), mtu.is_some(), pairs);
        for pair in &kernel {
            all &= pair.features() | !OF_THE_RING;
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        queue_sizes.push(CONTROL_SIZE);
        let mut net = Self {
            logger,
            log_limit: LogLimit::default(),
            events: QueueEvents::new()?,
            queue_sizes,
            offered: all,
            blocked: vec![false; taps.len()],
            taps,
            kernel,
            mac,
            mtu,
            link_up: true,
            paused: false,
            spill: Spill::default(),
            receive_limiter,
            send_limiter,
            counters: Counters::default(),
            agreed: 0,
            driver: None,
            pairs: Vec::new(),
            control: None,
            chain: Chain::default(),
            restored: None,
        };
        net.apply(DriverState { pairs: 1, offloads: 0 })?;
        Ok(net)
    }

    /// Whether frames take the kernel's path.
    pub fn is_in_kernel(&self) -> bool {
        !self.kernel.is_empty()
    }

    /// What has passed through user space.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Brings the link up or down; whether that is news to the guest.
    pub fn set_link(&mut self, up: bool) -> io::Result<bool> {
        let news = self.link_up != up;
        self.link_up = up;
        self.run_kernel()?;
        self.events.again();
        Ok(news)
    }

    /// Stops all frames where they are, or lets them go on.
    pub fn set_paused(&mut self, paused: bool) -> io::Result<()> {
        self.paused = paused;
        self.run_kernel()?;
        self.events.again();
        Ok(())
    }

    /// The device's own state; of a device that is paused.
    pub fn save(&self) -> NetState {
        NetState {
            version: STATE_VERSION,
            pairs: self.pair_count(),
            features: self.offered,
            mtu: self.mtu,
            mac: self.mac,
            link_up: self.link_up,
            driver: self.driver,
        }
    }

    /// Takes a saved state, before the transport restores its own.
    pub fn restore(&mut self, state: &NetState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)?;
        if state.pairs != self.pair_count() || state.mtu != self.mtu {
            return Err(RestoreError::Mismatch("queue pairs or MTU"));
        }
        if state.features & !self.offered != 0 {
            return Err(RestoreError::Mismatch("features that this host's tap or vhost-net lacks"));
        }
        if !is_unicast(state.mac) {
            return Err(RestoreError::Mismatch("hardware address"));
        }
        if let Some(driver) = state.driver {
            if driver.pairs == 0 || driver.pairs > state.pairs {
                return Err(RestoreError::Mismatch("queue pairs in use"));
            }
            if driver.offloads & !guest_offloads(state.features) != 0 {
                return Err(RestoreError::Mismatch("offloads"));
            }
        }
        self.offered = state.features;
        self.mac = state.mac;
        self.link_up = state.link_up;
        self.restored = state.driver;
        Ok(())
    }

    /// Whether frames pass.
    pub(super) fn is_open(&self) -> bool {
        self.link_up && !self.paused
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Pairs the guest uses: only those get frames.
    pub(super) fn pairs_in_use(&self) -> usize {
        self.driver.map_or(0, |driver| usize::from(driver.pairs))
    }

    /// The number of the control queue's kick among the kicks watched.
    pub(super) fn control_kick(&self) -> usize {
        2 * self.pairs.len()
    }

    /// Answers commands of the guest's, at most [`CONTROL_ROUND`].
    pub(super) fn serve_control(&mut self) {
        for _ in 0..CONTROL_ROUND {
            let Some(ring) = &mut self.control else { return };
            match ring.pop(&mut self.chain, control::LIMITS) {
                None if ring.ask_for_kicks() => {}
                None => return self.end_control_round(),
                Some(Err(error)) => self.complain(&error.to_string()),
                Some(Ok(())) => {
                    let answer = match self.command() {
                        Ok(()) => control::OK,
                        Err(why) => {
                            self.complain(&why);
                            control::ERROR
                        }
                    };
                    let len = self.chain.writable.copy_in(&[answer]);
                    if let Some(ring) = &mut self.control {
                        ring.give_back(self.chain.head(), len);
                    }
                }
            }
        }
        self.events.again();
        self.end_control_round();
    }

    fn end_control_round(&mut self) {
        if let Some(Err(error)) = self.control.as_mut().map(Ring::tell_guest) {
            error!(self.logger, "net: cannot interrupt the guest"; "error" => %error);
        }
    }

    /// Carries out the command in the chain.
    fn command(&mut self) -> Result<(), String> {
        // LIMITS bounds the length.
        let mut request = vec![0; self.chain.readable.len()];
        self.chain.readable.copy_out(&mut request);
        let command = control::parse(&request, self.agreed, self.pair_count())?;
        let Some(driver) = self.driver else { return Ok(()) };
        match command {
            Command::Receive => Ok(()),
            Command::Mac(mac) => {
                self.mac = mac;
                Ok(())
            }
            Command::Pairs(pairs) => {
                self.apply(DriverState { pairs, ..driver }).map_err(|error| error.to_string())?;
                // Frames may wait in the queues that are used now.
                self.events.again();
                Ok(())
            }
            Command::Offloads(offloads) => {
                self.apply(DriverState { offloads, ..driver }).map_err(|error| error.to_string())
            }
        }
    }

    /// Notes that the guest did what it may not, within bounds.
    pub(super) fn complain(&mut self, why: &str) {
        if let Some(suppressed) = self.log_limit.allow() {
            debug!(self.logger, "net: dropped"; "why" => why, "suppressed" => suppressed);
        }
    }

    /// Tells the tap what the driver has set; noted for the driver there is.
    fn apply(&mut self, driver: DriverState) -> io::Result<()> {
        for (index, tap) in self.taps.iter_mut().enumerate() {
            tap.attach(index < usize::from(driver.pairs))?;
        }
        // Of the whole tap, whichever queue is asked.
        self.taps[0].set_offloads(tap_flags(driver.offloads))?;
        if let Some(current) = &mut self.driver {
            *current = driver;
        }
        Ok(())
    }

    /// Starts and stops the kernel's path as link and pause say.
    fn run_kernel(&mut self) -> io::Result<()> {
        let open = self.is_open();
        for (pair, tap) in self.kernel.iter_mut().zip(&self.taps) {
            pair.run(open.then_some(tap))?;
        }
        Ok(())
    }

    fn pair_count(&self) -> u16 {
        // At most MAX_PAIRS.
        u16::try_from(self.taps.len()).unwrap_or(u16::MAX)
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues } = activation;
        let (got, wanted) = (queues.len(), self.queues_needed(features));
        if got != wanted {
            return Err(ActivateError::Queues { got, wanted });
        }
        self.agreed = features;
        let default = DriverState { pairs: 1, offloads: guest_offloads(features) };
        let driver = self.restored.take().unwrap_or(default);
        self.driver = Some(driver);
        self.apply(driver)?;
        let memory = Arc::new(memory);
        let mut kicks = Vec::new();
        let mut queues = queues.into_iter();
        for index in 0..wanted / 2 {
            let (Some(receive), Some(send)) = (queues.next(), queues.next()) else { break };
            if let Some(kernel) = self.kernel.get_mut(index) {
                kernel.start(&memory, features, [receive, send]).map_err(io::Error::other)?;
                continue;
            }
            kicks.extend([receive.kick.try_clone()?, send.kick.try_clone()?]);
            let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
            self.pairs.push(Pair {
                receiver: Receiver::new(receive, &memory, mergeable),
                sender: Sender::new(send, &memory, features),
            });
        }
        if let Some(ActiveQueue { queue, kick, interrupt }) = queues.next() {
            kicks.push(kick);
            self.control = Some(Ring::new(queue, interrupt, memory));
        }
        self.events.arm(kicks)?;
        self.run_kernel()?;
        // Frames that came before the driver wait in the tap: nothing else will tell of them.
        self.events.again();
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Without MQ the control queue, if any, comes behind the first pair.
    fn queues_needed(&self, features: u64) -> usize {
        let pairs = if has(features, VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 };
        2 * pairs + usize::from(has(features, VIRTIO_NET_F_CTRL_VQ))
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let link = if self.link_up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&link.to_le_bytes()[..2]);
        config[8..10].copy_from_slice(&self.pair_count().to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let result = self.start(activation);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn reset(&mut self) {
        for pair in &mut self.kernel {
            pair.reset();
        }
        self.pairs.clear();
        self.control = None;
        self.driver = None;
        self.agreed = 0;
        self.events.disarm();
        if let Err(error) = self.apply(DriverState { pairs: 1, offloads: 0 }) {
            error!(self.logger, "net: tap not reset"; "error" => %error);
        }
    }

    fn positions(&self) -> Vec<QueuePosition> {
        let kernel = self.kernel.iter().flat_map(KernelPair::positions);
        let pairs = self.pairs.iter();
        let user = pairs.flat_map(|pair| [pair.receiver.position(), pair.sender.position()]);
        kernel.chain(user).chain(self.control.iter().map(Ring::position)).collect()
    }
}
