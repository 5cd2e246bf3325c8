//! Descriptor chains, checked and turned into memory segments that system calls can use.
//!
//! This is the one place where addresses and lengths from descriptors are checked: every segment
//! lies in guest memory, the device-readable part comes before the device-writable one, and neither
//! the number of segments nor the bytes pass the given limits. What the guest *writes into* the
//! segments may change at any time; whoever looks at it copies it out first.

use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory as _, VolatileSlice};

use crate::vm::GuestMemory;

/// The most segments a chain may have; the kernel takes 1024 in one `sendmsg`, headers included.
pub const MAX_SEGMENTS: usize = 1000;

/// How long the two parts of a chain may be, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What the device reads.
    pub readable: usize,
    /// What the device writes.
    pub writable: usize,
}

/// What is wrong with a chain. Always the guest's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No descriptor at all: the head lies outside the table, or the table outside memory.
    #[error("the chain has no descriptors")]
    Empty,
    /// It names a next descriptor that is not there, or runs in a circle.
    #[error("the chain does not end")]
    Endless,
    /// A readable descriptor comes after a writable one.
    #[error("the chain has a readable part after a writable one")]
    Order,
    /// A part lies outside guest memory.
    #[error("the chain points outside memory")]
    Outside,
    /// Longer than the device allows.
    #[error("the chain is longer than the device allows")]
    TooLong,
    /// In more pieces than the device allows.
    #[error("the chain has more than {MAX_SEGMENTS} segments")]
    TooMany,
}

/// Pieces of guest memory, in order.
#[derive(Default)]
pub struct Segments {
    iovecs: Vec<libc::iovec>,
    /// Segments before this one are used up.
    first: usize,
    len: usize,
}

// SAFETY: the pointers go into guest memory, which any thread may touch; they are only made and used
// through `Chain`, which keeps that memory mapped.
unsafe impl Send for Segments {}

impl Segments {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments left, for a system call.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs[self.first..]
    }

    /// Drops up to `count` bytes at the front.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        while left > 0 {
            let segment = &mut self.iovecs[self.first];
            if segment.iov_len > left {
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(left).cast();
                segment.iov_len -= left;
                return;
            }
            left -= segment.iov_len;
            self.first += 1;
        }
    }

    /// Drops what is past `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let mut excess = self.len.saturating_sub(len);
        self.len -= excess;
        while excess > 0 {
            let Some(last) = self.iovecs.last_mut() else { return };
            if last.iov_len > excess {
                last.iov_len -= excess;
                return;
            }
            excess -= last.iov_len;
            self.iovecs.pop();
        }
    }

    /// Copies bytes at the front out; returns how many there were, at most `bytes.len()`.
    pub fn copy_out(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            if done == bytes.len() {
                break;
            }
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies `bytes` to `offset` bytes behind the front, as far as there is room.
    pub fn copy_in_at(&self, offset: usize, mut bytes: &[u8]) {
        let mut skip = offset;
        for slice in self.slices() {
            if let Ok(slice) = slice.offset(skip) {
                let count = slice.len().min(bytes.len());
                slice.copy_from(&bytes[..count]);
                bytes = &bytes[count..];
            }
            skip = skip.saturating_sub(slice.len());
        }
    }

    /// Copies `bytes` to the front; returns how many had room.
    pub fn copy_in(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let count = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + count]);
            done += count;
        }
        done
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.iovecs().iter().map(|iovec| {
            // SAFETY: `push` took pointer and length from one slice of guest memory, later calls
            // only shrank it, and `Chain` keeps the memory mapped.
            unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
        })
    }

    fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.len = 0;
    }

    fn push(&mut self, slice: &VolatileSlice<'_>) {
        let len = slice.len();
        self.iovecs
            .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
        self.len += len;
    }
}

/// One chain of a queue. Made once and loaded again and again: loading allocates nothing once the
/// lists have grown.
#[derive(Default)]
pub struct Chain {
    head: u16,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
    /// Keeps what the segments point into mapped.
    memory: Option<Arc<GuestMemory>>,
}

impl Chain {
    /// The index under which the chain is given back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Takes the descriptors of `chain`. On error the chain is empty but for its head.
    pub fn load(
        &mut self,
        memory: &Arc<GuestMemory>,
        chain: DescriptorChain<&GuestMemory>,
        limits: Limits,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.head = chain.head_index();
        if !self.memory.as_ref().is_some_and(|held| Arc::ptr_eq(held, memory)) {
            self.memory = Some(Arc::clone(memory));
        }
        let result = self.collect(memory, chain, limits);
        if result.is_err() {
            self.readable.clear();
            self.writable.clear();
        }
        result
    }

    fn collect(
        &mut self,
        memory: &GuestMemory,
        chain: DescriptorChain<&GuestMemory>,
        limits: Limits,
    ) -> Result<(), ChainError> {
        let mut unfinished = None;
        let mut writing = false;
        for descriptor in chain {
            unfinished = Some(descriptor.has_next());
            let (part, limit) = if descriptor.is_write_only() {
                writing = true;
                (&mut self.writable, limits.writable)
            } else if writing {
                return Err(ChainError::Order);
            } else {
                (&mut self.readable, limits.readable)
            };
            // A u32 always fits: the only target has 64 bits.
            let len = descriptor.len() as usize;
            if len > limit - part.len {
                return Err(ChainError::TooLong);
            }
            for slice in memory.get_slices(descriptor.addr(), len) {
                part.push(&slice.map_err(|_| ChainError::Outside)?);
            }
            if self.readable.iovecs.len() + self.writable.iovecs.len() > MAX_SEGMENTS {
                return Err(ChainError::TooMany);
            }
        }
        // The iterator ends silently at a bad link; only a last descriptor without a link is an end.
        match unfinished {
            None => Err(ChainError::Empty),
            Some(true) => Err(ChainError::Endless),
            Some(false) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const LIMITS: Limits = Limits { readable: 0x1000, writable: 0x1000 };

    fn memory() -> Arc<GuestMemory> {
        // Two regions that touch, and a hole behind them.
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
    }

    fn load(
        memory: &Arc<GuestMemory>,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<Chain, ChainError> {
        let mock = MockSplitQueue::new(&**memory, 16);
        for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
            let raw = RawDescriptor::from(Descriptor::new(address, len, flags, next));
            if index < 16 {
                mock.desc_table().store(index, raw).unwrap();
            }
        }
        mock.avail().ring().ref_at(0).unwrap().store(0);
        mock.avail().idx().store(1);
        let mut queue: Queue = mock.create_queue().unwrap();
        let mut chain = Chain::default();
        chain.load(memory, queue.pop_descriptor_chain(&**memory).unwrap(), LIMITS)?;
        Ok(chain)
    }

    #[test]
    fn good_chains_are_split_and_may_cross_regions() {
        let memory = memory();
        memory.write_slice(b"hello", GuestAddress(0xfffd)).unwrap();
        let chain = load(
            &memory,
            &[
                (0xfffd, 5, NEXT, 1),
                (0x3000, 0, NEXT, 2),
                (0x4000, 8, WRITE | NEXT, 3),
                (0x5000, 8, WRITE, 0),
            ],
        )
        .unwrap();
        assert_eq!(chain.readable.len(), 5);
        assert_eq!(chain.readable.iovecs().len(), 2);
        assert_eq!(chain.writable.len(), 16);
        let mut bytes = [0; 8];
        assert_eq!(chain.readable.copy_out(&mut bytes), 5);
        assert_eq!(&bytes[..5], b"hello");
        assert_eq!(chain.writable.copy_in(b"0123456789"), 10);
        let mut tail = [0; 2];
        memory.read_slice(&mut tail, GuestAddress(0x5000)).unwrap();
        assert_eq!(&tail, b"89");
    }

    #[test]
    fn segments_shrink_at_both_ends() {
        let memory = memory();
        let mut chain =
            load(&memory, &[(0x3000, 4, NEXT, 1), (0x4000, 4, NEXT, 2), (0x5000, 4, 0, 0)])
                .unwrap();
        memory.write_slice(b"abcd", GuestAddress(0x3000)).unwrap();
        memory.write_slice(b"efgh", GuestAddress(0x4000)).unwrap();
        chain.readable.advance(6);
        assert_eq!(chain.readable.len(), 6);
        chain.readable.truncate(2);
        let mut bytes = [0; 8];
        assert_eq!(chain.readable.copy_out(&mut bytes), 2);
        assert_eq!(&bytes[..2], b"gh");
        chain.readable.advance(100);
        assert!(chain.readable.is_empty());
        assert!(chain.readable.iovecs().is_empty());
    }

    #[test]
    fn hostile_chains_are_refused() {
        let memory = memory();
        let refused = |descriptors: &[_]| load(&memory, descriptors).err();
        assert_eq!(refused(&[(0x3000, 1, NEXT, 0)]), Some(ChainError::Endless), "a circle");
        assert_eq!(refused(&[(0x3000, 1, NEXT, 99)]), Some(ChainError::Endless), "a bad link");
        assert_eq!(refused(&[(0x1f_fff0, 16, 0, 0)]), Some(ChainError::Outside));
        assert_eq!(refused(&[(0x1fff0, 17, 0, 0)]), Some(ChainError::Outside), "into the hole");
        assert_eq!(refused(&[(u64::MAX, 16, 0, 0)]), Some(ChainError::Outside));
        assert_eq!(refused(&[(0x3000, 0x1001, 0, 0)]), Some(ChainError::TooLong));
        assert_eq!(refused(&[(0x3000, u32::MAX, WRITE, 0)]), Some(ChainError::TooLong));
        assert_eq!(
            refused(&[(0x3000, 1, WRITE | NEXT, 1), (0x3000, 1, 0, 0)]),
            Some(ChainError::Order)
        );
        assert_eq!(refused(&[(0x3000, 8, INDIRECT, 0)]), Some(ChainError::Empty), "odd table");
        assert_eq!(refused(&[(0xffff_0000, 16, INDIRECT, 0)]), Some(ChainError::Empty));
    }

    #[test]
    fn an_indirect_table_cannot_outgrow_the_limit() {
        let memory = memory();
        for index in 0..2000_u64 {
            let next = u16::try_from(index + 1).unwrap();
            let raw = RawDescriptor::from(Descriptor::new(0x9000, 1, NEXT, next));
            memory.write_obj(raw, GuestAddress(0x10000 + index * 16)).unwrap();
        }
        assert_eq!(
            load(&memory, &[(0x10000, 32000, INDIRECT, 0)]).err(),
            Some(ChainError::TooMany)
        );
    }

    /// A descriptor, mostly one that leads on and lies in memory.
    fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
        let address = prop_oneof![4 => 0_u64..0x2_0400, 1 => any::<u64>()];
        let len = prop_oneof![6 => 0_u32..0x600, 1 => any::<u32>()];
        let flags = prop_oneof![4 => Just(NEXT), 3 => Just(NEXT | WRITE), 2 => 0_u16..8];
        (address, len, flags, 0_u16..18)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// What is loaded lies in memory, within the limits, and is what the table says: read first,
        /// then written, each piece as long as its descriptor.
        #[test]
        fn a_chain_is_what_its_table_says(
            table in prop::collection::vec(descriptor(), 1..16),
        ) {
            let memory = memory();
            let loaded = load(&memory, &table);
            let Ok(chain) = loaded else { return Ok(()) };
            let bytes = |part: &Segments| {
                part.iovecs().iter().map(|iovec| iovec.iov_len).sum::<usize>()
            };
            prop_assert_eq!(bytes(&chain.readable), chain.readable.len());
            prop_assert_eq!(bytes(&chain.writable), chain.writable.len());
            prop_assert!(chain.readable.len() <= LIMITS.readable);
            prop_assert!(chain.writable.len() <= LIMITS.writable);
            let count = chain.readable.iovecs().len() + chain.writable.iovecs().len();
            prop_assert!(count <= MAX_SEGMENTS);
            // Followed by hand, as long as nothing is indirect.
            let (mut at, mut read, mut written) = (0_usize, 0, 0);
            for _ in 0..table.len() {
                let Some(&(address, len, flags, next)) = table.get(at) else { return Ok(()) };
                if flags & INDIRECT != 0 {
                    return Ok(());
                }
                let len = usize::try_from(len).unwrap();
                prop_assert!(len == 0 || memory.check_range(GuestAddress(address), len));
                if flags & WRITE == 0 {
                    prop_assert_eq!(written, 0, "read after written");
                    read += len;
                } else {
                    written += len;
                }
                if flags & NEXT == 0 {
                    prop_assert_eq!((read, written), (chain.readable.len(), chain.writable.len()));
                    return Ok(());
                }
                at = next.into();
            }
        }

        /// However a part is used up and cut, it holds what a list of bytes would.
        #[test]
        fn segments_are_a_list_of_bytes(
            pieces in prop::collection::vec(0_u32..40, 1..15),
            steps in prop::collection::vec((0_u8..4, 0_usize..50), 0..20),
        ) {
            let memory = memory();
            let content: Vec<u8> = (0..0x2_0000_u32).map(|at| at.to_le_bytes()[0]).collect();
            memory.write_slice(&content, GuestAddress(0)).unwrap();
            let mut model = Vec::new();
            let mut table = Vec::new();
            for (number, &len) in (1_u16..).zip(&pieces) {
                // Across the border of two regions, too.
                let address = 0xffe0 + 7 * u64::from(number);
                let next = if usize::from(number) < pieces.len() { NEXT } else { 0 };
                table.push((address, len, next, number));
                let start = usize::try_from(address).unwrap();
                model.extend_from_slice(&content[start..start + usize::try_from(len).unwrap()]);
            }
            let mut part = load(&memory, &table).unwrap().readable;
            for (step, count) in steps {
                match step {
                    0 => {
                        part.advance(count);
                        model.drain(..count.min(model.len()));
                    }
                    1 => {
                        part.truncate(count);
                        model.truncate(count);
                    }
                    2 => {
                        part.copy_in_at(count, &[]);
                    }
                    _ => {
                        let mut bytes = vec![0; count];
                        let copied = part.copy_out(&mut bytes);
                        prop_assert_eq!(copied, count.min(model.len()));
                        prop_assert_eq!(&bytes[..copied], &model[..copied]);
                    }
                }
                prop_assert_eq!(part.len(), model.len());
                prop_assert_eq!(part.is_empty(), model.is_empty());
            }
        }
    }
}
