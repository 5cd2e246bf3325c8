//! Names, asked of a name server that an engine runs in the sandbox's network namespace on the host.
//!
//! Docker's answers at a loopback address there, which inside the guest is the guest's own. So what is
//! asked at that address is steered to sockets of the agent's, and goes to the host by a stream; nothing is
//! bound to the port, which a container may want for itself.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use husk_agent_protocols::resolver::{ADDRESS, Carrier, Header, PORT};
use husk_bpf::steer::{Addresses, Protocol, Rule, steer};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::host::{Address, Host, stream};

/// Questions that an answer can still come to. Those who asked before have asked again by then.
const WAITING: usize = 256;
/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 32;
/// For the next question of a connection, and for each answer to one.
const PATIENCE: Duration = Duration::from_secs(20);
/// The headers of IPv4 and of UDP.
const HEADERS: usize = 20 + 8;

/// Who is to have an answer.
#[derive(Debug)]
enum Asker {
    Packet(SocketAddrV4),
    Connection(oneshot::Sender<Vec<u8>>),
}

type Question = (Asker, Vec<u8>);

/// Who has asked what, by the number of the question.
#[derive(Debug, Default)]
struct Waiting {
    askers: Vec<Option<(u16, Asker)>>,
    next: u16,
}

impl Waiting {
    /// Its number; who has waited longest may be forgotten for it.
    fn add(&mut self, asker: Asker) -> u16 {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.askers.resize_with(WAITING, || None);
        self.askers[usize::from(number) % WAITING] = Some((number, asker));
        number
    }

    fn take(&mut self, number: u16) -> Option<Asker> {
        let place = self.askers.get_mut(usize::from(number) % WAITING)?;
        place.take_if(|(waits, _)| *waits == number).map(|(_, asker)| asker)
    }
}

/// From now on, what is asked at the name server's address goes to `to`, for as long as the host keeps the
/// connection.
pub async fn serve(host: &Host, to: Address) -> io::Result<()> {
    let packets = UdpSocket::bind((ADDRESS, 0)).await?;
    let listener = TcpListener::bind((ADDRESS, 0)).await?;
    let answers = answering_socket()?;
    let rule = |protocol, socket| {
        let to = Addresses::V4(ADDRESS, std::net::Ipv4Addr::BROADCAST);
        Rule { protocol, to, port: Some(PORT), socket }
    };
    let rules = [rule(Protocol::Udp, packets.as_fd()), rule(Protocol::Tcp, listener.as_fd())];
    let steering = steer(File::open("/proc/thread-self/ns/net")?.as_fd(), &rules)?;
    let (from_host, to_host) = stream(host.dial(to)?).await?.into_split();
    let (asked, questions) = mpsc::channel(8);
    let waiting = Mutex::default();
    tokio::spawn(async move {
        // The first that ends, ends it all: the host has closed the stream.
        tokio::select! {
            _ = take_packets(&packets, &asked) => {}
            _ = take_connections(&listener, &asked) => {}
            _ = ask(questions, to_host, &waiting) => {}
            _ = answer(from_host, answers.as_fd(), &waiting) => {}
        }
        drop(steering);
    });
    Ok(())
}

async fn take_packets(packets: &UdpSocket, asked: &mpsc::Sender<Question>) -> io::Result<()> {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let (length, from) = packets.recv_from(&mut buffer).await?;
        let SocketAddr::V4(from) = from else { continue };
        let question = (Asker::Packet(from), buffer[..length].to_vec());
        asked.send(question).await.map_err(io::Error::other)?;
    }
}

async fn take_connections(
    listener: &TcpListener,
    asked: &mpsc::Sender<Question>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
        while connections.try_join_next().is_some() {}
        let (stream, _) = listener.accept().await?;
        let asked = asked.clone();
        connections.spawn(async move {
            // It is over for this one, whatever it was.
            let _ = serve_connection(stream, &asked).await;
            drop(permit);
        });
    }
}

/// Questions one after the other, each with its length before it, as DNS has it.
async fn serve_connection(mut stream: TcpStream, asked: &mpsc::Sender<Question>) -> io::Result<()> {
    loop {
        let length = timeout(PATIENCE, stream.read_u16()).await??;
        let mut question = vec![0; length.into()];
        timeout(PATIENCE, stream.read_exact(&mut question)).await??;
        let (sender, answer) = oneshot::channel();
        asked.send((Asker::Connection(sender), question)).await.map_err(io::Error::other)?;
        let answer = timeout(PATIENCE, answer).await?.map_err(io::Error::other)?;
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat()).await?;
    }
}

async fn ask(
    mut questions: mpsc::Receiver<Question>,
    mut to_host: OwnedWriteHalf,
    waiting: &Mutex<Waiting>,
) -> io::Result<()> {
    while let Some((asker, question)) = questions.recv().await {
        let carrier = match asker {
            Asker::Packet(_) => Carrier::Udp,
            Asker::Connection(_) => Carrier::Tcp,
        };
        let number = waiting.lock().unwrap_or_else(PoisonError::into_inner).add(asker);
        if let Some(message) = Header::before(carrier, number, &question) {
            to_host.write_all(&message).await?;
        }
    }
    Ok(())
}

async fn answer(
    mut from_host: OwnedReadHalf,
    answers: BorrowedFd<'_>,
    waiting: &Mutex<Waiting>,
) -> io::Result<()> {
    loop {
        let mut header = [0; Header::LENGTH];
        from_host.read_exact(&mut header).await?;
        let header = Header::from_bytes(header).ok_or(io::ErrorKind::InvalidData)?;
        let mut answer = vec![0; header.length.into()];
        from_host.read_exact(&mut answer).await?;
        let asker = waiting.lock().unwrap_or_else(PoisonError::into_inner).take(header.number);
        match asker {
            Some(Asker::Packet(to)) => {
                if let Some(packet) = packet(to, &answer) {
                    // One that is lost is asked for again.
                    let address = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
                    let _ = sendto(answers.as_raw_fd(), &packet, &address, MsgFlags::MSG_DONTWAIT);
                }
            }
            Some(Asker::Connection(to)) => drop(to.send(answer)),
            None => {}
        }
    }
}

/// Who asks by UDP expects the answer from the address and the port that were asked. To send from there
/// without being bound there, packets are sent with their headers.
fn answering_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Raw)?)
}

/// The answer as a packet to `to`; none if it is too long for one.
fn packet(to: SocketAddrV4, answer: &[u8]) -> Option<Vec<u8>> {
    let whole = u16::try_from(HEADERS + answer.len()).ok()?;
    let mut packet = Vec::with_capacity(whole.into());
    // Version and length of the header, kind of service, length, number, no fragments.
    packet.extend([0x45, 0]);
    packet.extend(whole.to_be_bytes());
    packet.extend([0, 0, 0x40, 0]);
    // Time to live, UDP, a checksum that the kernel fills in.
    packet.extend([64, 17, 0, 0]);
    packet.extend(ADDRESS.octets());
    packet.extend(to.ip().octets());
    packet.extend(PORT.to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend((whole - 20).to_be_bytes());
    // No checksum: it goes no further than the loopback device.
    packet.extend([0, 0]);
    packet.extend(answer);
    Some(packet)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn an_answer_finds_who_asked_and_no_other() {
        let mut waiting = Waiting::default();
        let asker = |port| Asker::Packet(SocketAddrV4::new(ADDRESS, port));
        assert!(waiting.take(0).is_none());
        let first = waiting.add(asker(1));
        let numbers: Vec<_> = (2..=300).map(|port| waiting.add(asker(port))).collect();
        assert!(waiting.take(first).is_none(), "its place is another's");
        let taken = waiting.take(numbers[298]);
        assert!(matches!(taken, Some(Asker::Packet(to)) if to.port() == 300), "{taken:?}");
        assert!(waiting.take(numbers[298]).is_none(), "answered twice");
    }

    /// A name server that answers every question with its bytes backwards.
    fn backwards(listener: &UnixListener) {
        let (mut stream, _) = listener.accept().unwrap();
        loop {
            let mut header = [0; Header::LENGTH];
            if stream.read_exact(&mut header).is_err() {
                return;
            }
            let header = Header::from_bytes(header).unwrap();
            let mut question = vec![0; header.length.into()];
            stream.read_exact(&mut question).unwrap();
            question.reverse();
            // An answer to nobody does no harm.
            for number in [header.number.wrapping_add(9), header.number] {
                let answer = Header::before(header.carrier, number, &question).unwrap();
                stream.write_all(&answer).unwrap();
            }
        }
    }

    #[test]
    fn what_is_asked_is_answered_while_the_port_is_free() {
        let apart = husk_skip::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                return husk_skip::skipped("namespaces need root");
            }
            super::super::loopback_up().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("7")).unwrap();
            std::thread::spawn(move || backwards(&listener));
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let host = Host::Directory(folder.path().to_owned());
                if let Err(error) = serve(&host, Address::open(7)).await {
                    return husk_skip::skipped(error);
                }
                // A container's own name server.
                let _own = UdpSocket::bind("0.0.0.0:53").await.unwrap();
                let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                client.connect((ADDRESS, PORT)).await.unwrap();
                for length in [3_u16, 512, 40_000] {
                    let question: Vec<u8> = (0..length).map(|byte| byte.to_be_bytes()[1]).collect();
                    client.send(&question).await.unwrap();
                    let mut answer = vec![0; 65_535];
                    let received =
                        timeout(PATIENCE, client.recv(&mut answer)).await.unwrap().unwrap();
                    answer.truncate(received);
                    answer.reverse();
                    assert_eq!(answer, question);
                }
                let mut connection = TcpStream::connect((ADDRESS, PORT)).await.unwrap();
                for question in [&b"\x00\x03one"[..], b"\x00\x03two"] {
                    connection.write_all(question).await.unwrap();
                    let mut answer = [0; 5];
                    connection.read_exact(&mut answer).await.unwrap();
                    answer[2..].reverse();
                    assert_eq!(answer, question);
                }
            });
        });
        apart.join().unwrap();
    }
}
