//! containerd's stream server, as `kubectl exec`, `attach` and `port-forward` use it: a WebSocket on
//! which the first byte of each message names a channel.

use std::future::poll_fn;
use std::pin::Pin;

use anyhow::{Context, Result, bail, ensure};
use futures::{Sink, Stream};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::wait::PATIENCE;

/// What each channel carries.
pub const STDIN: u8 = 0;
/// See [`STDIN`].
pub const STDOUT: u8 = 1;
/// See [`STDIN`].
pub const STDERR: u8 = 2;
/// How it ended, as a `Status` of Kubernetes.
const STATUS: u8 = 3;
/// The terminal's size.
const RESIZE: u8 = 4;

/// Channels 0 to 4, of which the last two came with version 4.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// A session on the stream server.
#[derive(Debug)]
pub struct Session<'a> {
    tokio: &'a tokio::runtime::Runtime,
    socket: tokio_tungstenite::WebSocketStream<TcpStream>,
    /// What has come, by channel.
    came: [Vec<u8>; 5],
    ended: bool,
}

impl<'a> Session<'a> {
    /// Opens the session at `url`, which containerd has prepared.
    pub fn open(tokio: &'a tokio::runtime::Runtime, url: &str) -> Result<Self> {
        let plain = url.strip_prefix("http://").context("not an http URL")?;
        let host = plain.split('/').next().unwrap_or_default().to_owned();
        let mut request = format!("ws://{plain}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let socket = tokio.block_on(async {
            let stream = TcpStream::connect(host).await?;
            anyhow::Ok(client_async(request, stream).await?.0)
        })?;
        Ok(Self { tokio, socket, came: Default::default(), ended: false })
    }

    /// Sends `bytes` on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = Message::binary([&[channel], bytes].concat());
        let mut socket = Pin::new(&mut self.socket);
        self.tokio.block_on(async {
            poll_fn(|context| socket.as_mut().poll_ready(context)).await?;
            socket.as_mut().start_send(message)?;
            poll_fn(|context| socket.as_mut().poll_flush(context)).await?;
            Ok(())
        })
    }

    /// Says how large the terminal is.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size = serde_json::json!({ "Width": columns, "Height": rows });
        self.send(RESIZE, size.to_string().as_bytes())
    }

    /// Takes the next message in; false at the end.
    fn receive(&mut self) -> Result<bool> {
        let mut socket = Pin::new(&mut self.socket);
        let message = self.tokio.block_on(async {
            let next = poll_fn(|context| socket.as_mut().poll_next(context));
            tokio::time::timeout(PATIENCE, next).await
        });
        let message = message.with_context(|| format!("nothing more came after {self:?}"))?;
        let data = match message {
            Some(Ok(Message::Binary(data))) => data,
            Some(Ok(Message::Close(_))) | None => return Ok(false),
            Some(Ok(_)) => return Ok(true),
            Some(Err(error)) => bail!("{error} after {:?}", self.came),
        };
        if let Some((channel, bytes)) = data.split_first() {
            let came = self.came.get_mut(usize::from(*channel)).context("an unknown channel")?;
            came.extend(bytes);
        }
        Ok(true)
    }

    /// Waits until `text` has come on a channel.
    pub fn until(&mut self, channel: u8, text: &str) -> Result<()> {
        loop {
            let came = String::from_utf8_lossy(&self.came[usize::from(channel)]).into_owned();
            if came.contains(text) {
                return Ok(());
            }
            ensure!(!self.ended, "{came:?} came, not {text:?}");
            self.ended = !self.receive()?;
        }
    }

    /// Waits for the end: the exit code.
    pub fn exit_code(&mut self) -> Result<i32> {
        while !self.ended {
            self.ended = !self.receive()?;
        }
        let status: Value = serde_json::from_slice(&self.came[usize::from(STATUS)])
            .with_context(|| format!("no status in {:?}", self.came))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let code = status["details"]["causes"][0]["message"].as_str();
        Ok(code.with_context(|| format!("{status}"))?.parse()?)
    }

    /// All that has come on a channel, as text.
    pub fn came(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.came[usize::from(channel)]).into_owned()
    }
}
