//! The header before each frame (virtio 1.2, section 5.1.6), as the guest sends it.
//!
//! It is copied out of guest memory, checked, and given to the tap from the copy: the guest cannot
//! change it afterwards, and the host's kernel sees no offload that was not agreed on.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of the header.
pub const HEADER: usize = 12;
/// Where the number of buffers lies in it.
pub const NUM_BUFFERS: usize = 10;
/// An Ethernet header: a frame is not shorter.
pub const ETHERNET: usize = 14;
/// The longest frame with its header: 64 KiB of packet behind an Ethernet header and two VLAN tags.
pub const LONGEST: usize = HEADER + ETHERNET + 8 + 65535;

/// Checks a header before a frame of `len` bytes, and returns it as the tap may have it.
pub fn check(
    header: [u8; HEADER],
    len: usize,
    features: u64,
) -> Result<[u8; HEADER], &'static str> {
    let [flags, gso, hl0, hl1, size0, size1, start0, start1, offset0, offset1, _, _] = header;
    let has = |feature: u32| features & 1 << feature != 0;
    let word = |low, high| usize::from(u16::from_le_bytes([low, high]));
    let mut checked = [0; HEADER];
    if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
        if !has(VIRTIO_NET_F_CSUM) {
            return Err("checksum offload was not agreed on");
        }
        // Three words: the sum cannot overflow.
        if word(start0, start1) + word(offset0, offset1) + 2 > len {
            return Err("checksum outside the frame");
        }
        checked[0] = 1;
        checked[6..10].copy_from_slice(&[start0, start1, offset0, offset1]);
    }
    let congestion = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let kind = u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN;
    let (agreed, tcp) = match kind {
        VIRTIO_NET_HDR_GSO_NONE => return Ok(checked),
        VIRTIO_NET_HDR_GSO_TCPV4 => (has(VIRTIO_NET_F_HOST_TSO4), true),
        VIRTIO_NET_HDR_GSO_TCPV6 => (has(VIRTIO_NET_F_HOST_TSO6), true),
        VIRTIO_NET_HDR_GSO_UDP => (has(VIRTIO_NET_F_HOST_UFO), false),
        VIRTIO_NET_HDR_GSO_UDP_L4 => (has(VIRTIO_NET_F_HOST_USO), false),
        _ => return Err("unknown segmentation"),
    };
    if !agreed || congestion && !(tcp && has(VIRTIO_NET_F_HOST_ECN)) {
        return Err("segmentation offload was not agreed on");
    }
    if word(size0, size1) == 0 {
        return Err("segments of no bytes");
    }
    if word(hl0, hl1) > len {
        return Err("headers longer than the frame");
    }
    checked[1] = gso;
    checked[2..6].copy_from_slice(&[hl0, hl1, size0, size1]);
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;
    const CHECKSUM: [u8; HEADER] = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    const SEGMENTS: [u8; HEADER] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];

    #[test]
    fn only_what_was_agreed_on_passes() {
        assert_eq!(check([0; HEADER], 60, 0), Ok([0; HEADER]));
        assert_eq!(check(CHECKSUM, 60, ALL), Ok(CHECKSUM));
        assert!(check(CHECKSUM, 60, ALL & !1).is_err());
        assert_eq!(check(SEGMENTS, 3000, ALL), Ok(SEGMENTS));
        for (kind, feature) in [(1, 11), (4, 12), (3, 14), (5, 56)] {
            let mut header = SEGMENTS;
            header[1] = kind;
            assert!(check(header, 3000, ALL).is_ok());
            assert!(check(header, 3000, ALL & !(1 << feature)).is_err());
            header[1] |= 0x80;
            assert_eq!(check(header, 3000, ALL).is_ok(), matches!(kind, 1 | 4));
            assert!(check(header, 3000, ALL & !(1 << 13)).is_err());
        }
    }

    #[test]
    fn nothing_points_outside_the_frame() {
        assert!(check(CHECKSUM, 52, ALL).is_ok());
        assert!(check(CHECKSUM, 51, ALL).is_err());
        assert!(check([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], 60, ALL).is_err());
        assert!(check(SEGMENTS, 53, ALL).is_err());
        let mut header = SEGMENTS;
        header[2..4].copy_from_slice(&[0xff, 0xff]);
        assert!(check(header, 3000, ALL).is_err());
        let mut header = SEGMENTS;
        header[4..6].copy_from_slice(&[0, 0]);
        assert!(check(header, 3000, ALL).is_err());
    }

    #[test]
    fn what_means_nothing_is_taken_out() {
        let odd = [0xfe, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
        assert_eq!(check(odd, 60, ALL), Ok([0; HEADER]));
        for kind in [2, 6, 0x7f] {
            assert!(check([0, kind, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], 60, ALL).is_err());
        }
    }
}
