//! Questions for an engine's name server, on the stream that `ServeResolver` opens: each is a header and
//! a DNS message, and so is each answer.

use std::net::Ipv4Addr;

/// Where Docker's name server answers inside the network namespace of a container.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// The port of name servers.
pub const PORT: u16 = 53;

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// In a packet.
    Udp,
    /// By a connection: the answer may be longer than fits into a packet.
    Tcp,
}

/// What precedes a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the question came.
    pub carrier: Carrier,
    /// The same in a question and its answer.
    pub number: u16,
    /// Bytes of the message.
    pub length: u16,
}

impl Header {
    /// Bytes of a header.
    pub const LENGTH: usize = 5;

    /// As it is sent.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let [a, b] = self.number.to_be_bytes();
        let [c, d] = self.length.to_be_bytes();
        // The internet's numbers for the two.
        let carrier = match self.carrier {
            Carrier::Tcp => 6,
            Carrier::Udp => 17,
        };
        [carrier, a, b, c, d]
    }

    /// From what came; none if it is none.
    pub fn from_bytes([carrier, a, b, c, d]: [u8; Self::LENGTH]) -> Option<Self> {
        let carrier = match carrier {
            6 => Carrier::Tcp,
            17 => Carrier::Udp,
            _ => return None,
        };
        let (number, length) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        Some(Self { carrier, number, length })
    }

    /// The header and a message, in one piece; none if the message is too long for one.
    pub fn before(carrier: Carrier, number: u16, message: &[u8]) -> Option<Vec<u8>> {
        let length = u16::try_from(message.len()).ok()?;
        Some([&Self { carrier, number, length }.to_bytes(), message].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_out_as_it_went_in() {
        for carrier in [Carrier::Udp, Carrier::Tcp] {
            let header = Header { carrier, number: 0x1234, length: 0xfedc };
            assert_eq!(Header::from_bytes(header.to_bytes()), Some(header));
        }
        assert_eq!(Header::from_bytes([1, 0, 0, 0, 0]), None);
        assert_eq!(Header::before(Carrier::Udp, 7, b"ab"), Some(vec![17, 0, 7, 0, 2, b'a', b'b']));
        assert_eq!(Header::before(Carrier::Tcp, 7, &[0; 65_536]), None);
    }
}
