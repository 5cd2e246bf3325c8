//! Where a stream of the guest's comes to, and where from.

use std::io;

use husk_agent_protocols::agent::HostPort;
use rustix::rand::{GetRandomFlags, getrandom};

/// The ports of both ends: well-known ones and the agent's are below, the machine's own above.
const HOST_PORTS: std::ops::Range<u32> = 0x1_0000..0xc000_0000;
/// Ports from which every process may dial; the last number of all means none.
const GUEST_PORTS: std::ops::Range<u32> = 0x1_0000..u32::MAX;

/// The vsock ports of a stream's two ends, of which only the agent is told: the machine takes the stream
/// from no other port of the guest's. Any process in the guest may dial any port, so this is what tells the
/// agent from the others, with some 63 bits to guess at one connection a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamAddress {
    /// The host's port.
    pub port: u32,
    /// The port that the agent dials from.
    pub from: u32,
}

impl StreamAddress {
    /// One that nobody knows.
    pub(super) fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
        }
        let [port, from] = [0, 8].map(|at| {
            let mut half = [0; 8];
            half.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(half)
        });
        Ok(Self { port: within(HOST_PORTS, port), from: within(GUEST_PORTS, from) })
    }
}

/// A number of `range`; so many more bits are drawn than it has that all of them are as likely.
fn within(range: std::ops::Range<u32>, random: u64) -> u32 {
    let offset = random % u64::from(range.end - range.start);
    // Below the range's length.
    range.start + u32::try_from(offset).unwrap_or(0)
}

impl From<StreamAddress> for HostPort {
    fn from(StreamAddress { port, from }: StreamAddress) -> Self {
        Self { port, from, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_differ_and_keep_to_their_ranges() {
        let drawn: Vec<_> = (0..1000).map(|_| StreamAddress::random().unwrap()).collect();
        assert!(drawn.iter().all(|a| HOST_PORTS.contains(&a.port)));
        assert!(drawn.iter().all(|a| GUEST_PORTS.contains(&a.from)));
        let different: std::collections::HashSet<_> = drawn.iter().collect();
        assert_eq!(different.len(), drawn.len());
        for (random, port) in [(0, 0x1_0000), (0xbffe_ffff, 0xbfff_ffff), (0xbfff_0000, 0x1_0000)] {
            assert_eq!(within(HOST_PORTS, random), port);
        }
        assert_eq!(within(GUEST_PORTS, 0xfffe_fffe), u32::MAX - 1);
    }
}
