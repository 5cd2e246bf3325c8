//! Bytes of the guest's that the host end has not taken yet.

use crate::devices::virtio::chain::Segments;

/// Memory above this is given back when the backlog is empty.
const KEEP: usize = 16 * 1024;

/// A queue of bytes; its length is bounded by credit.
#[derive(Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    /// Bytes before this are gone.
    first: usize,
}

impl Backlog {
    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.first
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes waiting.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.first..]
    }

    /// Appends all of `data`.
    pub fn append(&mut self, data: &Segments) {
        if self.first > self.bytes.len() / 2 {
            self.bytes.drain(..self.first);
            self.first = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + data.len(), 0);
        data.copy_out(&mut self.bytes[end..]);
    }

    /// Drops `count` bytes at the front.
    pub fn advance(&mut self, count: usize) {
        self.first = (self.first + count).min(self.bytes.len());
        if self.is_empty() {
            self.first = 0;
            self.bytes.clear();
            self.bytes.shrink_to(KEEP);
        }
    }
}
