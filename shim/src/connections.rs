//! The clients' connections, and the news that the last of them has closed its own.
//!
//! A client that reads the end of a connection may take a pending call for lost although the answer
//! came first: containerd's does, by chance. So the shim ends after its clients have hung up.

use std::io::{self, IoSlice};
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::task::{Context, Poll};

use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// How many connections there are.
#[derive(Debug, Clone)]
pub struct Connections(watch::Sender<usize>);

impl Connections {
    /// None yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// Has the connections that `listener`, which does not block, takes for ttrpc counted.
    pub fn listen(&self, listener: UnixListener) -> io::Result<Listener> {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let open = self.0.clone();
        Ok(Listener::new(futures::stream::unfold(listener, move |listener| {
            let open = open.clone();
            async move {
                let accepted = listener.accept().await;
                Some((accepted.map(|(stream, _)| Connection::new(stream, open)), listener))
            }
        })))
    }

    /// Waits until there is none.
    pub async fn closed(&self) {
        // The sender is ours: it does not go away.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

/// A connection that counts.
struct Connection {
    stream: UnixStream,
    open: watch::Sender<usize>,
}

impl Connection {
    fn new(stream: UnixStream, open: watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Self { stream, open }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
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

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
