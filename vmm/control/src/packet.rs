//! Packets: JSON with descriptors beside it, over `SOCK_SEQPACKET`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{MAX_DESCRIPTORS, MAX_PACKET};

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The system call failed; `EAGAIN` on a non-blocking socket means "later".
    #[error("control socket")]
    Socket(#[source] Errno),
    /// The text is no message of the expected kind.
    #[error("control message not understood")]
    Json(#[source] serde_json::Error),
    /// More bytes or descriptors than a packet may have.
    #[error("control packet larger than {MAX_PACKET} bytes or {MAX_DESCRIPTORS} descriptors")]
    TooLarge,
    /// A message named a descriptor that did not come with it.
    #[error("control message names descriptor {0}, which did not come with it")]
    NoDescriptor(usize),
}

impl PacketError {
    /// Whether a non-blocking socket merely has nothing (or no room) now.
    pub fn is_would_block(&self) -> bool {
        matches!(self, Self::Socket(Errno::AGAIN))
    }
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet<T> {
    /// The message.
    pub message: T,
    descriptors: Vec<Option<OwnedFd>>,
}

impl<T> Packet<T> {
    /// Takes the descriptor at `position` out of the packet; each can be taken once.
    pub fn take(&mut self, position: usize) -> Result<OwnedFd, PacketError> {
        self.descriptors
            .get_mut(position)
            .and_then(Option::take)
            .ok_or(PacketError::NoDescriptor(position))
    }
}

/// A connected pair of control sockets, both closed on exec.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), PacketError> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(PacketError::Socket)
}

/// Sends one message with its descriptors.
pub fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), PacketError> {
    let text = serde_json::to_vec(message).map_err(PacketError::Json)?;
    if text.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
        return Err(PacketError::TooLarge);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        // The space is enough for as many as were checked for above.
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(PacketError::Socket(errno)),
            // A sequenced packet goes whole or not at all.
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives one message; `None` when the peer has closed the socket.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<Packet<T>>, PacketError> {
    let mut text = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut text)];
        match recvmsg(socket.as_fd(), &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(PacketError::Socket(errno)),
            Ok(received) => break received,
        }
    };
    // Own the descriptors before any way out, those of a packet with too many as well, so that a bad
    // packet leaks none.
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = message {
            descriptors.extend(list.map(Some));
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(PacketError::TooLarge);
    }
    let length = received.bytes;
    if length == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    let message = serde_json::from_slice(&text[..length]).map_err(PacketError::Json)?;
    Ok(Some(Packet { message, descriptors }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, MachineMessage};

    #[test]
    fn carries_message_and_descriptors() {
        let (a, b) = socket_pair().unwrap();
        let message = MachineMessage::Event(Event::Connection { port: 7 });
        send(&a, &message, &[b.as_fd()]).unwrap();
        let mut packet = receive::<MachineMessage>(&b).unwrap().unwrap();
        assert_eq!(packet.message, message);
        assert!(matches!(packet.take(1), Err(PacketError::NoDescriptor(1))));
        let again = packet.take(0).unwrap();
        assert!(matches!(packet.take(0), Err(PacketError::NoDescriptor(0))));
        send(&a, &message, &[]).unwrap();
        assert!(receive::<MachineMessage>(&again).unwrap().is_some());
    }

    #[test]
    fn a_closed_peer_is_the_end() {
        let (a, b) = socket_pair().unwrap();
        drop(a);
        assert!(receive::<MachineMessage>(&b).unwrap().is_none());
    }

    #[test]
    fn refuses_what_is_no_message() {
        let (a, b) = socket_pair().unwrap();
        rustix::io::write(&a, b"{\"event\":{\"teapot\":{}}}").unwrap();
        assert!(matches!(receive::<MachineMessage>(&b), Err(PacketError::Json(_))));
    }

    #[test]
    fn descriptors_of_a_packet_that_is_refused_are_closed() {
        use std::io::Read;
        let (a, b) = socket_pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let many = [writer.as_fd(); MAX_DESCRIPTORS];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&many)));
        let long = vec![b'1'; MAX_PACKET + 1];
        sendmsg(&a, &[IoSlice::new(&long)], &mut rights, SendFlags::empty()).unwrap();
        drop(writer);
        assert!(matches!(receive::<u64>(&b), Err(PacketError::TooLarge)));
        // Would wait for ever if somebody held the other end.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn carries_what_eight_vcpus_and_many_interfaces_need() {
        let (a, b) = socket_pair().unwrap();
        // Kernel, console, file server; and two for each of eight queues of fourteen interfaces.
        let count = 12 + 2 * 8 * 14;
        send(&a, &1u64, &vec![a.as_fd(); count]).unwrap();
        let mut packet = receive::<u64>(&b).unwrap().unwrap();
        packet.take(count - 1).unwrap();
        let too_many = vec![a.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(matches!(send(&a, &1u64, &too_many), Err(PacketError::TooLarge)));
    }

    #[test]
    fn refuses_what_is_too_large() {
        let (a, b) = socket_pair().unwrap();
        let long = "x".repeat(MAX_PACKET);
        assert!(matches!(send(&a, &long, &[]), Err(PacketError::TooLarge)));
        rustix::io::write(&a, &vec![b'1'; MAX_PACKET + 1]).unwrap();
        assert!(matches!(receive::<u64>(&b), Err(PacketError::TooLarge)));
    }
}
