//! Tables of nftables, each made in one transaction.

use std::io;

use netlink_packet_core::{
    DecodeError, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::Socket;
use nix::sys::socket::{setsockopt, sockopt::SndBufForce};

/// The protocol number of netfilter's netlink.
const NETLINK_NETFILTER: isize = 12;
/// The subsystem nftables, which is the upper half of its messages' types.
const NFTABLES: u8 = 10;
/// The messages round a transaction (`NFNL_MSG_BATCH_*`).
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
/// `NFT_MSG_*`
const NEW_TABLE: u8 = 0;
const REMOVE_TABLE: u8 = 2;
const NEW_RULE: u8 = 6;

/// `NFTA_TABLE_NAME`, which removing a table has too.
const TABLE_NAME: u16 = 1;
/// `NFT_TABLE_MAXNAMELEN`
const LONGEST_NAME: usize = 256;

/// The sequence number of messages that are not the host's; those are counted from 1.
const OWN: u32 = 0;

/// A table, and what makes it and all that is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// `NFPROTO_*`
    pub family: u8,
    pub name: String,
    /// The types of messages (`NFT_MSG_*`), and their attributes.
    pub messages: Vec<(u8, Vec<u8>)>,
}

impl Table {
    /// Returns whether it is the same table, whatever is in it.
    pub fn is(&self, other: &Self) -> bool {
        self.family == other.family && self.name == other.name
    }

    /// Returns the transaction that removes the table, whether or not it is there.
    fn removal(&self) -> Vec<u8> {
        batch(&self.removing())
    }

    /// Returns the transaction that makes the table: anew, or with what is in it already.
    pub fn making(&self, anew: bool) -> Vec<u8> {
        let mut all = if anew { self.removing() } else { Vec::new() };
        for ((kind, attributes), sequence) in self.messages.iter().zip(OWN + 1..) {
            all.push((Message::of(*kind, self.family, attributes.clone()), sequence));
        }
        batch(&all)
    }

    fn removing(&self) -> Vec<(Message, u32)> {
        let mut name = self.name.as_bytes().to_vec();
        name.truncate(LONGEST_NAME);
        name.push(0);
        let length = u16::try_from(4 + name.len()).unwrap_or_default();
        let mut attributes = [length.to_ne_bytes(), TABLE_NAME.to_ne_bytes()].concat();
        attributes.extend(name);
        attributes.resize(attributes.len().next_multiple_of(4), 0);
        // To remove what is not there is an error; to add what is there is none.
        let add = Message::of(NEW_TABLE, self.family, attributes.clone());
        vec![(add, OWN), (Message::of(REMOVE_TABLE, self.family, attributes), OWN)]
    }
}

/// Returns a transaction of messages with their sequence numbers.
fn batch(messages: &[(Message, u32)]) -> Vec<u8> {
    let edge = |kind| (Message { kind, head: [0, 0, 0, NFTABLES], attributes: Vec::new() }, OWN);
    let (begin, end) = (edge(BEGIN), edge(END));
    let mut bytes = Vec::new();
    for (message, sequence) in [&begin].into_iter().chain(messages).chain([&end]) {
        let mut header = NetlinkHeader::default();
        header.flags = message.flags();
        header.sequence_number = *sequence;
        let payload = NetlinkPayload::InnerMessage(message.clone());
        let mut message = NetlinkMessage::new(header, payload);
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len(), 0);
        message.serialize(&mut bytes[start..]);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// A message of nfnetlink: `struct nfgenmsg` and attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    kind: u16,
    head: [u8; 4],
    attributes: Vec<u8>,
}

impl Message {
    fn of(kind: u8, family: u8, attributes: Vec<u8>) -> Self {
        let kind = u16::from_be_bytes([NFTABLES, kind]);
        Self { kind, head: [family, 0, 0, 0], attributes }
    }

    fn flags(&self) -> u16 {
        let [_, kind] = self.kind.to_be_bytes();
        match kind {
            _ if matches!(self.kind, BEGIN | END) => NLM_F_REQUEST,
            REMOVE_TABLE => NLM_F_REQUEST,
            NEW_RULE => NLM_F_REQUEST | NLM_F_CREATE | NLM_F_APPEND,
            _ => NLM_F_REQUEST | NLM_F_CREATE,
        }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.head.len() + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (head, attributes) = buffer.split_at_mut(self.head.len());
        head.copy_from_slice(&self.head);
        attributes.copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (head, attributes) = payload.split_first_chunk().unwrap_or((&[0; 4], &[]));
        Ok(Self { kind: header.message_type, head: *head, attributes: attributes.to_vec() })
    }
}

/// A socket for transactions, in the namespace of the thread that opened it.
pub struct Nftables(Socket);

impl Nftables {
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        // Of what is refused, the header will do.
        socket.set_cap_ack(true)?;
        Ok(Self(socket))
    }

    /// Removes a table, if it is there.
    pub fn remove(&mut self, table: &Table) -> io::Result<()> {
        match self.commit(&table.removal())? {
            None => Ok(()),
            Some((_, error)) => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Makes a table, anew or with what is in it already. Returns what is refused, if anything is: the position
    /// of the message, and the error's number. Nothing is done then.
    pub fn make(&mut self, table: &Table, anew: bool) -> io::Result<Option<(usize, i32)>> {
        let refused = self.commit(&table.making(anew))?;
        let position = |sequence: u32| match sequence {
            OWN => table.messages.len(),
            counted => usize::try_from(counted - 1).unwrap_or(usize::MAX),
        };
        Ok(refused.map(|(sequence, error)| (position(sequence), error)))
    }

    /// Hands a transaction to the kernel, which answers before the call returns, and only what is refused.
    /// Returns the first of that: its sequence number and the error's number.
    fn commit(&mut self, batch: &[u8]) -> io::Result<Option<(u32, i32)>> {
        // A transaction is one datagram.
        setsockopt(&self.0, SndBufForce, &(2 * batch.len()))?;
        self.0.send(batch, 0)?;
        let mut refused = None::<(u32, i32)>;
        loop {
            let mut answer = Vec::with_capacity(1024);
            match self.0.recv(&mut answer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(refused),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    // More than there was room for: nothing is done in that case either.
                    refused.get_or_insert((OWN, libc::ENOBUFS));
                    continue;
                }
                Err(error) => return Err(error),
            }
            let answer =
                NetlinkMessage::<Message>::deserialize(&answer).map_err(io::Error::other)?;
            let (sequence, NetlinkPayload::Error(error)) =
                (answer.header.sequence_number, answer.payload)
            else {
                continue;
            };
            let Some(code) = error.code else { continue };
            let is_first = refused
                .is_none_or(|(first, _)| first == OWN || (sequence != OWN && sequence < first));
            if is_first {
                refused = Some((sequence, code.get().saturating_neg()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> Table {
        let messages = vec![(NEW_TABLE, vec![1, 2, 3]), (NEW_RULE, Vec::new())];
        Table { family: 2, name: name.to_owned(), messages }
    }

    /// Types, flags and sequence numbers of a transaction's messages.
    fn messages(mut batch: &[u8]) -> Vec<(u16, u16, u32)> {
        let mut found = Vec::new();
        while !batch.is_empty() {
            let message = NetlinkMessage::<Message>::deserialize(batch).unwrap();
            let header = message.header;
            found.push((header.message_type, header.flags, header.sequence_number));
            let length = usize::try_from(header.length).unwrap().next_multiple_of(4);
            batch = &batch[length..];
        }
        found
    }

    #[test]
    fn a_transaction_counts_the_hosts_messages_only() {
        let create = NLM_F_REQUEST | NLM_F_CREATE;
        let (rule, table_made) = (0xa06, (0xa00, create, 1));
        let made = [(BEGIN, NLM_F_REQUEST, 0), table_made, (rule, create | NLM_F_APPEND, 2)];
        let end = (END, NLM_F_REQUEST, 0);
        assert_eq!(messages(&table("t").making(false)), [&made[..], &[end]].concat());
        let removal = [(BEGIN, NLM_F_REQUEST, 0), (0xa00, create, 0), (0xa02, NLM_F_REQUEST, 0)];
        assert_eq!(messages(&table("t").making(true)), [&removal, &made[1..], &[end]].concat());
        assert_eq!(messages(&table("t").removal()), [&removal[..], &[end]].concat());
        // A name that no kernel takes.
        assert_eq!(messages(&table(&"t".repeat(70_000)).removal()).len(), 4);
    }
}
