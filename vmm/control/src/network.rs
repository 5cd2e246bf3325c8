//! Network devices in the messages to a machine.

use serde::{Deserialize, Serialize};

use crate::machine::Descriptor;

/// A virtio-net device, over taps of the host's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkDevice {
    /// What it is called in requests and metrics: 1 to 64 bytes, unique in the machine.
    pub id: String,
    /// One tap descriptor per queue pair, each attached already with `IFF_TAP | IFF_NO_PI |
    /// IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` if there are more than one.
    pub queues: Vec<Descriptor>,
    /// `/dev/vhost-net`, opened once per queue pair; none: frames pass through user space.
    #[serde(default)]
    pub vhost: Vec<Descriptor>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The largest packet, if the guest is to be told: 68 to 65535 bytes.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// What the guest may receive. With a limit, frames pass through user space even if there are
    /// vhost descriptors: the kernel's path counts nothing.
    #[serde(default)]
    pub receive_limit: Option<RateLimit>,
    /// What the guest may send, as above.
    #[serde(default)]
    pub send_limit: Option<RateLimit>,
}

/// A limit on what passes in one direction; each bucket that is there must have a token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// A token per byte.
    #[serde(default)]
    pub bytes: Option<TokenBucket>,
    /// A token per frame as it passes between guest and tap: one with segmentation offload counts
    /// as one.
    #[serde(default)]
    pub packets: Option<TokenBucket>,
}

/// A bucket of tokens that fills up steadily.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens it holds; not 0. It is full at first.
    pub size: u64,
    /// Tokens on top, once, at first.
    #[serde(default)]
    pub burst: u64,
    /// Milliseconds in which an empty bucket becomes full; not 0.
    pub refill_ms: u64,
}

/// Counters of a network device. Drops are of what passes through user space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkMetrics {
    /// The device.
    pub id: String,
    /// Frames pass through the kernel only (vhost-net): what passes is counted by the tap, not
    /// here, and the counters below stay 0.
    pub kernel: bool,
    /// Frames the guest has received.
    pub received_packets: u64,
    /// Bytes the guest has received.
    pub received_bytes: u64,
    /// Frames the guest should have received, but could not.
    pub received_drops: u64,
    /// Frames the guest has sent.
    pub sent_packets: u64,
    /// Bytes the guest has sent.
    pub sent_bytes: u64,
    /// Frames the guest has sent that were malformed, or that the tap did not take.
    pub sent_drops: u64,
}
