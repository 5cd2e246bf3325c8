//! The courier border: raw FUSE messages on stream sockets.
//!
//! The machine writes one request at a time on a channel and reads its answer before it writes the
//! next; requests that have no answer may follow one another at once. `fuse_in_header.len` frames a
//! request, `fuse_out_header.len` an answer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use fuse_backend_rs::Error;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};

use super::buffer::Buffer;
use super::message::{Header, answer};
use super::tree::Tree;
use crate::fuse::{DESTROY, IN_HEADER, LONGEST, NOTIFY_REPLY};

/// After so much silence a channel gives its buffers' memory back.
const IDLE_MILLISECONDS: libc::c_int = 1000;

/// Messages up to this size are not worth giving memory back for.
const SMALL: usize = 64 * 1024;

/// One channel with its buffers.
pub struct Channel<'a> {
    socket: OwnedFd,
    server: &'a Server<&'a Tree>,
    tree: &'a Tree,
    request: Buffer,
    /// Bytes of `request` that have been received.
    filled: usize,
    answer: Buffer,
    /// Whether large messages have passed since memory was last given back.
    swollen: bool,
}

impl<'a> Channel<'a> {
    /// A channel on `socket`.
    pub fn new(socket: OwnedFd, server: &'a Server<&'a Tree>, tree: &'a Tree) -> io::Result<Self> {
        let request = Buffer::new(LONGEST)?;
        let answer = Buffer::new(LONGEST)?;
        Ok(Self { socket, server, tree, request, filled: 0, answer, swollen: false })
    }

    /// Serves until the machine closes the channel. A message that cannot be followed is an error;
    /// the caller closes the channel then.
    pub fn serve(&mut self) -> io::Result<()> {
        while let Some(header) = self.receive()? {
            self.handle(header)?;
            self.swollen |= header.length > SMALL;
            // What follows is at most the beginning of the next requests, usually nothing.
            self.request.copy_within(header.length..self.filled, 0);
            self.filled -= header.length;
        }
        Ok(())
    }

    /// Receives until a whole request lies at the start of the buffer.
    fn receive(&mut self) -> io::Result<Option<Header>> {
        loop {
            if let Some(header) = Header::read(&self.request[..self.filled])?
                && header.length <= self.filled
            {
                return Ok(Some(header));
            }
            if (self.swollen || self.tree.is_busy())
                && self.filled == 0
                && !self.readable(IDLE_MILLISECONDS)?
            {
                self.tree.rest();
                self.request.release();
                self.answer.release();
                self.swollen = false;
            }
            let room = &mut self.request[self.filled..];
            // SAFETY: `room` is ours to write to, and its length goes along.
            let count = unsafe {
                libc::recv(self.socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0)
            };
            match usize::try_from(count) {
                Ok(0) => return Ok(None),
                Ok(count) => self.filled += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    match error.raw_os_error() {
                        Some(libc::EINTR) => {}
                        Some(libc::ECONNRESET) => return Ok(None),
                        _ => return Err(error),
                    }
                }
            }
        }
    }

    fn readable(&self, milliseconds: libc::c_int) -> io::Result<bool> {
        let mut poll =
            libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as the count says.
        match unsafe { libc::poll(&mut poll, 1, milliseconds) } {
            -1 if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => {
                Err(io::Error::last_os_error())
            }
            count => Ok(count > 0),
        }
    }

    fn handle(&mut self, header: Header) -> io::Result<()> {
        let body = &self.request[IN_HEADER..header.length];
        if !header.is_well_formed(body) {
            return self.reply(header, Err(libc::EINVAL));
        }
        if let Some(extra) = header.extra(body) {
            let result = self.tree.handle_extra(&header, extra);
            return self
                .reply(header, result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)));
        }
        match header.opcode {
            // Nothing is ever notified, and fuse-backend-rs would answer.
            NOTIFY_REPLY => return Ok(()),
            // It would not answer this, and the guest waits.
            DESTROY => {
                self.tree.forget_all();
                return self.reply(header, Ok(Vec::new()));
            }
            _ => {}
        }
        let reader =
            Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut self.request[..header.length]))
                .map_err(io::Error::other)?;
        let writer = FuseDevWriter::new(self.socket.as_raw_fd(), &mut self.answer)
            .map_err(io::Error::other)?;
        match self.server.handle_message(reader, Writer::FuseDev(writer), None, None) {
            Ok(written) => {
                self.swollen |= written > SMALL;
                Ok(())
            }
            // Such a message has no answer, so nothing is out of step.
            Err(_) if !header.wants_answer() => Ok(()),
            // It reads a request whole before it does or answers anything.
            Err(Error::DecodeMessage(_)) => self.reply(header, Err(libc::EINVAL)),
            // Whether it was answered is unknown.
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn reply(&self, header: Header, result: Result<Vec<u8>, i32>) -> io::Result<()> {
        if !header.wants_answer() {
            return Ok(());
        }
        let bytes = answer(header.unique, result);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            // SAFETY: `rest` is readable for its length.
            let count = unsafe {
                libc::send(
                    self.socket.as_raw_fd(),
                    rest.as_ptr().cast(),
                    rest.len(),
                    libc::MSG_NOSIGNAL,
                )
            };
            match usize::try_from(count) {
                Ok(count) => rest = &rest[count..],
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}
