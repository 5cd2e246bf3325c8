//! The agent's one connection, as ttrpc wants it, and the news that it has ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use husk_agent_protocols::AGENT_PORT;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::host::{Address, Host, stream};

/// How often, and after what pause, the host is dialled again if it refuses: it may be restoring.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// A connection that tells when the host has hung up.
pub struct Connection {
    stream: UnixStream,
    ended: Arc<Notify>,
}

/// Waits for the connection begun in `dialled`, and dials again if the host refuses it.
pub async fn connect(host: &Host, dialled: io::Result<OwnedFd>) -> io::Result<Connection> {
    let mut dialled = dialled;
    for attempt in 1.. {
        let connected = match dialled {
            Ok(socket) => stream(socket).await,
            Err(error) => Err(error),
        };
        let error = match connected {
            Ok(stream) => return Ok(Connection { stream, ended: Arc::default() }),
            Err(error) => error,
        };
        if attempt == TRIES {
            return Err(error);
        }
        tokio::time::sleep(PAUSE).await;
        dialled = host.dial(Address::open(AGENT_PORT));
    }
    unreachable!("the loop has no other end")
}

impl Connection {
    /// Told once when the host has hung up.
    pub fn ended(&self) -> Arc<Notify> {
        Arc::clone(&self.ended)
    }

    /// A descriptor of the same connection.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if read.is_err() || buffer.filled().len() == before {
            self.ended.notify_one();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
