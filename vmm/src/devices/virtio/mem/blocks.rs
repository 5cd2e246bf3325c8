//! Which blocks are plugged, and whether a request may change that.

use std::io;
use std::ops::Range;

use super::request::{Answer, BlockState};
use crate::vm::{BlockBacking, BlockRange};

/// The device's blocks.
pub(super) struct Blocks {
    range: BlockRange,
    plugged: Vec<bool>,
    /// How many are.
    present: u64,
    /// How many are to be.
    requested: u64,
    backing: Box<dyn BlockBacking>,
    counters: Counters,
}

/// Counters since the machine was built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks plugged.
    pub plugged: u64,
    /// Blocks unplugged.
    pub unplugged: u64,
    /// Requests that were not granted.
    pub refused: u64,
}

impl Blocks {
    /// None is plugged, and none is to be.
    pub(super) fn new(range: BlockRange, backing: Box<dyn BlockBacking>) -> Self {
        // At most a few thousand (`BlockRange::above`).
        let count = usize::try_from(range.count).unwrap_or(0);
        let counters = Counters::default();
        Self { range, plugged: vec![false; count], present: 0, requested: 0, backing, counters }
    }

    pub(super) fn range(&self) -> BlockRange {
        self.range
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes that are plugged.
    pub(super) fn present(&self) -> u64 {
        self.present * self.range.block
    }

    /// Bytes that are to be plugged.
    pub(super) fn requested(&self) -> u64 {
        self.requested * self.range.block
    }

    /// Sets how many bytes are to be plugged: whole blocks, as many as there are.
    pub(super) fn request(&mut self, bytes: u64) {
        self.requested = bytes.div_ceil(self.range.block).min(self.range.count);
    }

    /// Which are plugged, by number.
    pub(super) fn plugged(&self) -> Vec<u64> {
        (0..).zip(&self.plugged).filter(|(_, plugged)| **plugged).map(|(index, _)| index).collect()
    }

    pub(super) fn plug(&mut self, address: u64, count: u16) -> io::Result<Answer> {
        let blocks = match self.find(address, count) {
            Some(blocks) if self.state_of(&blocks) == BlockState::Unplugged => blocks,
            _ => return Ok(self.refuse(Answer::Error)),
        };
        // The one border between a guest and the host's memory.
        if self.present + u64::from(count) > self.requested {
            return Ok(self.refuse(Answer::Refused));
        }
        for index in blocks.clone() {
            if let Err(error) = self.set(index, true) {
                // Those before it are new, so the guest loses nothing.
                for index in blocks.start..index {
                    self.set(index, false)?;
                }
                self.refuse(Answer::Busy);
                return Err(error);
            }
        }
        self.counters.plugged += u64::from(count);
        Ok(Answer::Done)
    }

    pub(super) fn unplug(&mut self, address: u64, count: u16) -> io::Result<Answer> {
        let blocks = match self.find(address, count) {
            Some(blocks) if self.state_of(&blocks) == BlockState::Plugged => blocks,
            _ => return Ok(self.refuse(Answer::Error)),
        };
        for index in blocks {
            self.set(index, false)?;
            self.counters.unplugged += 1;
        }
        Ok(Answer::Done)
    }

    pub(super) fn unplug_all(&mut self) -> io::Result<Answer> {
        for index in 0..self.plugged.len() {
            if self.plugged[index] {
                self.set(index, false)?;
                self.counters.unplugged += 1;
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn state(&mut self, address: u64, count: u16) -> Answer {
        match self.find(address, count) {
            Some(blocks) => Answer::State(self.state_of(&blocks)),
            None => self.refuse(Answer::Error),
        }
    }

    /// Plugs the block of that number, for a state to be restored.
    pub(super) fn restore(&mut self, index: u64) -> io::Result<()> {
        let index =
            usize::try_from(index).ok().filter(|index| self.plugged.get(*index) == Some(&false));
        self.set(index.ok_or(io::ErrorKind::InvalidData)?, true)
    }

    pub(super) fn refuse(&mut self, answer: Answer) -> Answer {
        self.counters.refused += 1;
        answer
    }

    /// The numbers of `count` blocks from guest-physical `address` on: at least one, aligned, and all
    /// inside the range. Whoever has them can use them as an index.
    fn find(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.range.base)?;
        if count == 0 || !offset.is_multiple_of(self.range.block) {
            return None;
        }
        let first = offset / self.range.block;
        let end = first.checked_add(u64::from(count)).filter(|end| *end <= self.range.count)?;
        Some(usize::try_from(first).ok()?..usize::try_from(end).ok()?)
    }

    /// `blocks` come from [`Blocks::find`].
    fn state_of(&self, blocks: &Range<usize>) -> BlockState {
        let blocks = &self.plugged[blocks.clone()];
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => BlockState::Unplugged,
            all if all == blocks.len() => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    fn set(&mut self, index: usize, plugged: bool) -> io::Result<()> {
        if plugged {
            self.backing.plug(index as u64)?;
            self.present += 1;
        } else {
            self.backing.unplug(index as u64)?;
            self.present -= 1;
        }
        self.plugged[index] = plugged;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;

    pub(crate) const RANGE: BlockRange = BlockRange { base: 4 << 30, block: 128 << 20, count: 8 };

    /// Takes notes; fails at one block.
    #[derive(Clone, Default)]
    pub(crate) struct Notes {
        pub(crate) there: Arc<Mutex<BTreeSet<u64>>>,
        pub(crate) fails_at: Option<u64>,
    }

    impl BlockBacking for Notes {
        fn plug(&mut self, index: u64) -> io::Result<()> {
            if self.fails_at == Some(index) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            assert!(self.there.lock().unwrap().insert(index), "{index} is plugged already");
            Ok(())
        }
        fn unplug(&mut self, index: u64) -> io::Result<()> {
            assert!(self.there.lock().unwrap().remove(&index), "{index} is not plugged");
            Ok(())
        }
    }

    fn blocks(requested: u64) -> (Blocks, Notes) {
        let notes = Notes::default();
        let mut blocks = Blocks::new(RANGE, Box::new(notes.clone()));
        blocks.request(requested * RANGE.block);
        (blocks, notes)
    }

    #[test]
    fn only_whole_blocks_inside_the_range_are_granted() {
        let (mut blocks, notes) = blocks(8);
        for (address, count) in [
            (RANGE.base, 0),
            (RANGE.base + 4096, 1),
            (RANGE.base - RANGE.block, 1),
            (RANGE.base, 9),
            (RANGE.address(7), 2),
            (RANGE.address(8), 1),
            (0, 1),
            (u64::MAX, u16::MAX),
            (u64::MAX - RANGE.block + 1, 1),
        ] {
            assert_eq!(blocks.plug(address, count).unwrap(), Answer::Error, "{address:#x} {count}");
            assert_eq!(blocks.unplug(address, count).unwrap(), Answer::Error);
            assert_eq!(blocks.state(address, count), Answer::Error);
        }
        assert!(notes.there.lock().unwrap().is_empty());
        assert_eq!(blocks.plug(RANGE.base, 8).unwrap(), Answer::Done);
        assert_eq!(blocks.present(), 1 << 30);
    }

    #[test]
    fn nobody_gets_more_than_was_requested() {
        let (mut blocks, _) = blocks(3);
        assert_eq!(blocks.plug(RANGE.address(1), 2).unwrap(), Answer::Done);
        assert_eq!(blocks.plug(RANGE.address(3), 2).unwrap(), Answer::Refused);
        assert_eq!(blocks.plug(RANGE.address(2), 1).unwrap(), Answer::Error, "it is plugged");
        assert_eq!(blocks.plug(RANGE.address(3), 1).unwrap(), Answer::Done);
        assert_eq!(blocks.state(RANGE.address(0), 2), Answer::State(BlockState::Mixed));
        assert_eq!(blocks.unplug(RANGE.address(0), 2).unwrap(), Answer::Error, "one is not");
        blocks.request(0);
        assert_eq!(blocks.unplug(RANGE.address(1), 1).unwrap(), Answer::Done);
        assert_eq!(blocks.plug(RANGE.address(1), 1).unwrap(), Answer::Refused);
        assert_eq!(blocks.unplug_all().unwrap(), Answer::Done);
        assert_eq!((blocks.present(), blocks.requested()), (0, 0));
        let counters = Counters { plugged: 3, unplugged: 3, refused: 4 };
        assert_eq!(blocks.counters(), counters);
        blocks.request(u64::MAX);
        assert_eq!(blocks.requested(), RANGE.size());
    }

    #[test]
    fn what_the_host_cannot_give_is_undone() {
        let notes = Notes { fails_at: Some(3), ..Notes::default() };
        let mut blocks = Blocks::new(RANGE, Box::new(notes.clone()));
        blocks.request(RANGE.size());
        assert!(blocks.plug(RANGE.base, 5).is_err());
        assert!(notes.there.lock().unwrap().is_empty());
        assert_eq!(blocks.present(), 0);
        assert_eq!(blocks.plug(RANGE.base, 3).unwrap(), Answer::Done);
    }

    proptest! {
        /// Whatever a guest asks for, table and backing agree, and the border holds.
        #[test]
        fn any_requests_keep_the_table_right(
            requests in prop::collection::vec((0..5_u8, 0..10_u64, 0..4_u64, 0..10_u16), 0..60)
        ) {
            let (mut blocks, notes) = blocks(4);
            for (kind, block, odd, count) in requests {
                // Mostly aligned, sometimes not, sometimes before or behind the range.
                let address = RANGE.base - RANGE.block + block * RANGE.block + odd / 3 * 4096;
                let before = blocks.present();
                match kind {
                    0 => drop(blocks.plug(address, count).unwrap()),
                    1 => drop(blocks.unplug(address, count).unwrap()),
                    2 => drop(blocks.state(address, count)),
                    3 if count == 0 => drop(blocks.unplug_all().unwrap()),
                    3 => drop(blocks.plug(address, 1).unwrap()),
                    _ => blocks.request(u64::from(count) * RANGE.block),
                }
                let there: Vec<u64> = notes.there.lock().unwrap().iter().copied().collect();
                prop_assert_eq!(&there, &blocks.plugged());
                prop_assert_eq!(there.len() as u64 * RANGE.block, blocks.present());
                prop_assert!(blocks.present() <= before.max(blocks.requested()));
                prop_assert!(there.iter().all(|index| *index < RANGE.count));
            }
        }
    }
}
