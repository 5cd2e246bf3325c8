//! The features offered, and what they mean for the tap.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// What the ring's side needs of the kernel (vhost), if frames take that way.
pub const OF_THE_RING: u64 = bit(VIRTIO_F_VERSION_1)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_NET_F_MRG_RXBUF);

/// Always offered.
const COMMON: u64 = OF_THE_RING
    | bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_GUEST_UFO)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN)
    | bit(VIRTIO_NET_F_HOST_UFO)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR);

/// Offered if the tap can do segmentation of UDP.
const UDP_SEGMENTS: u64 =
    bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_USO6) | bit(VIRTIO_NET_F_HOST_USO);

/// What the guest takes off the host's hands: the feature, and the tap's flag for it.
const GUEST_OFFLOADS: [(u32, libc::c_uint); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

/// The bit of a feature.
pub const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Whether a feature is among others.
pub const fn has(features: u64, feature: u32) -> bool {
    features & bit(feature) != 0
}

/// The features of a device over a tap.
pub fn offered(udp_segments: bool, mtu: bool, pairs: usize) -> u64 {
    let mut features = COMMON;
    if udp_segments {
        features |= UDP_SEGMENTS;
    }
    if mtu {
        features |= bit(VIRTIO_NET_F_MTU);
    }
    if pairs > 1 {
        features |= bit(VIRTIO_NET_F_MQ);
    }
    features
}

/// The offloads of the guest's among features: what it may switch off and on again.
pub fn guest_offloads(features: u64) -> u64 {
    GUEST_OFFLOADS.iter().fold(0, |all, &(feature, _)| all | features & bit(feature))
}

/// The tap's flags for offloads of the guest's. Without checksums there is no segmentation.
pub fn tap_flags(offloads: u64) -> libc::c_uint {
    if !has(offloads, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = 0;
    for (feature, flag) in GUEST_OFFLOADS {
        if has(offloads, feature) {
            flags |= flag;
        }
    }
    // The tap takes this one only with what it belongs to, and UDP segments only for both.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if flags & udp != udp { flags & !udp } else { flags }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_is_told_what_it_can_take() {
        assert_eq!(tap_flags(bit(VIRTIO_NET_F_GUEST_TSO4)), 0, "no checksums");
        let offloads = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(tap_flags(offloads), libc::TUN_F_CSUM);
        assert_eq!(tap_flags(guest_offloads(offered(false, false, 1))), 0x1f);
        assert_eq!(tap_flags(guest_offloads(offered(true, false, 1))), 0x7f);
        let one = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_USO4);
        assert_eq!(tap_flags(one), libc::TUN_F_CSUM);
    }

    #[test]
    fn queues_and_mtu_are_offered_if_they_are_there() {
        assert!(!has(offered(false, false, 1), VIRTIO_NET_F_MQ));
        assert!(has(offered(false, false, 2), VIRTIO_NET_F_MQ));
        assert!(!has(offered(false, false, 1), VIRTIO_NET_F_MTU));
        assert!(has(offered(false, true, 1), VIRTIO_NET_F_MTU));
    }
}
