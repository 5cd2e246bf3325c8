//! Lists of nftables, by nfnetlink.

use std::io;

use rtnetlink::packet_core::{
    DecodeError, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::Socket;

/// The protocol number of netfilter's netlink.
pub const NETLINK_NETFILTER: isize = 12;
/// The subsystem nftables, in the upper half of a message's type.
const NFTABLES: u16 = 10 << 8;
/// `NLM_F_DUMP_INTR`: the kernel has seen that what it lists has changed meanwhile.
const INTERRUPTED: u16 = 0x10;

/// Length of `struct nfgenmsg`, which stands before the attributes.
const FAMILY_HEADER: usize = 4;

/// More than any ruleset has that a person wrote, in bytes.
const MOST: usize = 32 << 20;

/// Types of messages (`NFT_MSG_*`). What a GET lists, it lists as NEW.
pub const NEW_TABLE: u16 = 0;
pub const GET_TABLE: u16 = 1;
pub const NEW_CHAIN: u16 = 3;
pub const GET_CHAIN: u16 = 4;
pub const NEW_RULE: u16 = 6;
pub const GET_RULE: u16 = 7;
pub const NEW_SET: u16 = 9;
pub const GET_SET: u16 = 10;
pub const NEW_ELEMENTS: u16 = 12;
pub const GET_ELEMENTS: u16 = 13;
pub const NEW_OBJECT: u16 = 18;
pub const GET_OBJECT: u16 = 19;

/// A message of nftables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `NFT_MSG_*`
    pub kind: u16,
    /// `NFPROTO_*`; 0 for all in a request.
    pub family: u8,
    /// Of the ruleset that it is from, the lower half of the generation's number.
    generation: u16,
    pub attributes: Vec<u8>,
}

impl Message {
    fn request(kind: u16, family: u8, attributes: Vec<u8>) -> Self {
        Self { kind, family, generation: 0, attributes }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        NFTABLES | self.kind
    }

    fn buffer_len(&self) -> usize {
        FAMILY_HEADER + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let [high, low] = self.generation.to_be_bytes();
        buffer[..FAMILY_HEADER].copy_from_slice(&[self.family, 0, high, low]);
        buffer[FAMILY_HEADER..].copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let Some((&[family, _, high, low], attributes)) = payload.split_first_chunk() else {
            return Err("a message of netfilter is shorter than its header".to_owned().into());
        };
        Ok(Self {
            kind: header.message_type & 0xff,
            family,
            generation: u16::from_be_bytes([high, low]),
            attributes: attributes.to_vec(),
        })
    }
}

/// Lists of one ruleset, in the namespace of the thread that opened it.
pub struct Lists {
    socket: Socket,
    sequence: u32,
    length: usize,
    generation: Option<u16>,
}

impl Lists {
    /// Returns `None` if the kernel has no netfilter.
    pub fn open() -> io::Result<Option<Self>> {
        let mut socket = match Socket::new(NETLINK_NETFILTER) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
            other => other?,
        };
        socket.bind_auto()?;
        Ok(Some(Self { socket, sequence: 0, length: 0, generation: None }))
    }

    /// Returns what the kernel has of a kind; nothing if it has no nftables. Fails with `Interrupted` if that
    /// is not the ruleset that was listed before, because it has changed.
    pub fn list(&mut self, kind: u16, family: u8, attributes: Vec<u8>) -> io::Result<Vec<Message>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        header.sequence_number = self.sequence;
        let message = Message::request(kind, family, attributes);
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut found = Vec::new();
        while self.length < MOST {
            let (datagram, _) = self.socket.recv_from_full()?;
            self.length += datagram.len().max(1);
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message =
                    NetlinkMessage::<Message>::deserialize(rest).map_err(io::Error::other)?;
                let length = usize::try_from(message.header.length).map_err(io::Error::other)?;
                // Messages begin at multiples of four.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.flags & INTERRUPTED != 0 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => return nothing_or(error.to_io()),
                    NetlinkPayload::InnerMessage(one) => {
                        if *self.generation.get_or_insert(one.generation) != one.generation {
                            return Err(io::ErrorKind::Interrupted.into());
                        }
                        found.push(one);
                    }
                    _ => {}
                }
            }
        }
        Err(io::Error::other("there are too many packet filter rules"))
    }
}

/// A kernel without nftables has nothing. What has been removed meanwhile is not found.
fn nothing_or(error: io::Error) -> io::Result<Vec<Message>> {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Ok(Vec::new()),
        Some(libc::ENOENT) => Err(io::ErrorKind::Interrupted.into()),
        _ => Err(error),
    }
}
