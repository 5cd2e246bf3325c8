//! Commands on the control queue (virtio 1.2, section 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_MQ,
};

use super::features::{guest_offloads, has};
use crate::devices::virtio::chain::Limits;

/// A command fills at most this: addresses for a filter are the longest.
pub const LIMITS: Limits = Limits { readable: 64 << 10, writable: 4096 };
/// The answer of one byte: done.
pub const OK: u8 = 0;
/// The answer of one byte: not done.
pub const ERROR: u8 = 1;

/// What the guest wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// A change of what it receives. All that the tap gives is for this guest, so there is nothing
    /// to change.
    Receive,
    /// Another hardware address.
    Mac([u8; 6]),
    /// Use that many queue pairs.
    Pairs(u16),
    /// Take those offloads.
    Offloads(u64),
}

/// Understands a command, or says why not. `pairs` is how many there are.
pub fn parse(request: &[u8], features: u64, pairs: u16) -> Result<Command, &'static str> {
    let Some((&[class, command], data)) = request.split_first_chunk() else {
        return Err("shorter than its header");
    };
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
            if has(features, VIRTIO_NET_F_CTRL_RX) =>
        {
            match data {
                [_] => Ok(Command::Receive),
                _ => Err("receive mode of another length"),
            }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET)
            if has(features, VIRTIO_NET_F_CTRL_RX) =>
        {
            let rest = skip_table(data).and_then(skip_table);
            if rest == Some(&[]) { Ok(Command::Receive) } else { Err("bad table of addresses") }
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)
            if has(features, VIRTIO_NET_F_CTRL_MAC_ADDR) =>
        {
            let mac = data.try_into().map_err(|_| "hardware address of another length")?;
            if is_unicast(mac) { Ok(Command::Mac(mac)) } else { Err("no address of one device") }
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(features, VIRTIO_NET_F_MQ) => {
            let wanted = data.try_into().map_err(|_| "number of pairs of another length")?;
            let wanted = u16::from_le_bytes(wanted);
            if (1..=pairs).contains(&wanted) {
                Ok(Command::Pairs(wanted))
            } else {
                Err("more queue pairs than there are, or none")
            }
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
            if has(features, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) =>
        {
            let wanted = data.try_into().map_err(|_| "offloads of another length")?;
            let wanted = u64::from_le_bytes(wanted);
            if wanted & !guest_offloads(features) == 0 {
                Ok(Command::Offloads(wanted))
            } else {
                Err("offloads that were not agreed on")
            }
        }
        _ => Err("unknown command"),
    }
}

/// Whether an address is that of one device.
pub fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// What follows a table of addresses: their number, and six bytes each.
fn skip_table(data: &[u8]) -> Option<&[u8]> {
    let (count, rest) = data.split_first_chunk()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    rest.get(bytes..)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn commands_are_understood_if_they_were_agreed_on() {
        let cases: [(&[u8], u64, Command); 6] = [
            (&[0, 0, 1], 1 << 18, Command::Receive),
            (&[0, 1, 0], 1 << 18, Command::Receive),
            (&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6], 1 << 18, Command::Receive),
            (&[1, 1, 2, 0, 0, 0, 0, 1], 1 << 23, Command::Mac([2, 0, 0, 0, 0, 1])),
            (&[4, 0, 2, 0], 1 << 22, Command::Pairs(2)),
            (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], 1 << 2 | 1 << 1, Command::Offloads(2)),
        ];
        for (request, feature, command) in cases {
            assert_eq!(parse(request, ALL, 2), Ok(command));
            assert_eq!(parse(request, feature, 2), Ok(command));
            assert!(parse(request, ALL & !feature, 2).is_err());
            // No prefix of it is another command.
            for len in 0..request.len() {
                assert!(parse(&request[..len], ALL, 2).is_err(), "{request:?} to {len}");
            }
            let longer = [request, &[0]].concat();
            assert!(parse(&longer, ALL, 2).is_err());
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for request in [
            &[4, 0, 0, 0][..],
            &[4, 0, 3, 0],
            &[4, 1, 1, 0],
            &[1, 1, 1, 0, 0, 0, 0, 1],
            &[1, 1, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[0, 2, 1],
            &[2, 0, 1, 0],
            &[0xff, 0xff],
        ] {
            assert!(parse(request, ALL, 2).is_err(), "{request:?}");
        }
        assert!(parse(&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0], ALL, 2).is_err());
    }
}
