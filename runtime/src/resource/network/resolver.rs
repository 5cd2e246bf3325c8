//! A name server that an engine runs in the namespace, at an address of its loopback device.

use std::io;

use husk_agent_protocols::resolver::{ADDRESS, Carrier, PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};

use super::Namespace;

/// Asks it `question`, which may be anything; its answer, which is at most 65,535 bytes.
pub async fn ask(namespace: &Namespace, carrier: Carrier, question: &[u8]) -> io::Result<Vec<u8>> {
    match carrier {
        Carrier::Udp => {
            let socket = namespace.within(|| {
                let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
                // Nobody else's answers are taken.
                socket.connect((ADDRESS, PORT))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })?;
            let socket = UdpSocket::from_std(socket)?;
            socket.send(question).await?;
            let mut answer = vec![0; u16::MAX.into()];
            let length = socket.recv(&mut answer).await?;
            answer.truncate(length);
            Ok(answer)
        }
        Carrier::Tcp => {
            let socket = namespace.within(TcpSocket::new_v4)?;
            let mut stream = socket.connect((ADDRESS, PORT).into()).await?;
            let length = u16::try_from(question.len()).map_err(io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
            let mut answer = vec![0; stream.read_u16().await?.into()];
            stream.read_exact(&mut answer).await?;
            Ok(answer)
        }
    }
}
