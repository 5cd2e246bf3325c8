//! Random numbers that are the same for the same seed (SplitMix64), and often odd ones.

pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }

    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.any() >> 1).unwrap_or(0) % limit
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub fn byte(&mut self) -> u8 {
        self.any().to_le_bytes()[0]
    }

    /// A number that programs go wrong at, or any.
    pub fn odd(&mut self) -> u64 {
        let bit = 1 << self.below(64);
        match self.below(9) {
            0 => 0,
            1 => u64::MAX,
            2 => bit,
            3 => bit - 1,
            4 => bit.wrapping_neg(),
            5 => self.below(16),
            6 => self.below(0x1_0000),
            // Where the devices and the end of memory are.
            7 => 0xc000_0000 + self.below(0x40) * 0x1000,
            _ => self.any(),
        }
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.any().to_le_bytes()[..chunk.len()]);
        }
    }
}
