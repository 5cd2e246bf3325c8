//! A function's 256 bytes of configuration space (PCI local bus specification 3.0, chapter 6).
//!
//! Header type 0, a capability list, and BARs that the machine has placed. The guest may size a BAR
//! (write all ones, read the mask back) and move one that lies below 4 GiB: Linux chooses new
//! addresses for functions that come while it runs.

use serde::{Deserialize, Serialize};

use super::Bar;

/// Bytes in a configuration space.
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const BARS: usize = 6;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const BAR_64_BIT: u32 = 1 << 2;
const STATE_VERSION: u16 = 2;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor number.
    pub vendor: u16,
    /// Device number.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: `0x060000` is a host bridge.
    pub class: u32,
    /// Subsystem vendor number.
    pub subsystem_vendor: u16,
    /// Subsystem number.
    pub subsystem: u16,
}

/// Why a configuration space cannot be laid out or restored so. A mistake of the machine's, never
/// of the guest's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigSpaceError {
    /// The BAR is no aligned power of two, is taken, or lies past the sixth.
    #[error("BAR {0:?} cannot be added")]
    Bar(Bar),
    /// No room for a capability of that many bytes.
    #[error("no room for a capability of {0} bytes")]
    CapabilityRoom(usize),
    /// The saved state is of a function that is laid out in another way.
    #[error("saved configuration space is not this function's")]
    Layout,
    /// The saved state is of another version or shape.
    #[error("saved configuration space of version {0} is not understood")]
    State(u16),
}

#[derive(Debug, Clone, Copy)]
struct BarRegister {
    /// What the guest reads: address and type bits.
    value: u32,
    /// What it reads after having written all ones.
    mask: u32,
    /// All ones were written last.
    sizing: bool,
    /// A BAR of its own, below 4 GiB: the guest may move it.
    movable: bool,
}

/// The configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    registers: [Option<BarRegister>; BARS],
    bars: Vec<Bar>,
    last_capability: Option<usize>,
    free: usize,
}

/// What a guest can have changed in a configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigSpaceState {
    version: u16,
    bytes: Vec<u8>,
    sizing: [bool; BARS],
    addresses: [u32; BARS],
}

impl ConfigSpace {
    /// A header without BARs and capabilities; the command register's memory, bus master and INTx
    /// bits, the cache line size, latency timer and interrupt line are the guest's to write.
    pub fn new(identity: &Identity) -> Self {
        let mut bytes = [0; CONFIG_SIZE];
        bytes[0..2].copy_from_slice(&identity.vendor.to_le_bytes());
        bytes[2..4].copy_from_slice(&identity.device.to_le_bytes());
        bytes[8] = identity.revision;
        bytes[9..12].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        bytes[0x2c..0x2e].copy_from_slice(&identity.subsystem_vendor.to_le_bytes());
        bytes[0x2e..0x30].copy_from_slice(&identity.subsystem.to_le_bytes());
        let mut writable = [0; CONFIG_SIZE];
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        writable[0x0c] = 0xff;
        writable[0x0d] = 0xff;
        writable[0x3c] = 0xff;
        Self {
            bytes,
            writable,
            registers: [None; BARS],
            bars: Vec::new(),
            last_capability: None,
            free: FIRST_CAPABILITY,
        }
    }

    /// Adds a memory BAR; it is a 64-bit one, and takes two registers, if it ends above 4 GiB.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigSpaceError> {
        let refused = ConfigSpaceError::Bar(bar);
        if !bar.size.is_power_of_two() || bar.size < 16 || !bar.address.is_multiple_of(bar.size) {
            return Err(refused);
        }
        let Some(end) = bar.address.checked_add(bar.size) else { return Err(refused) };
        let wide = end > 1 << 32;
        let first = usize::from(bar.index);
        let last = first + usize::from(wide);
        if last >= BARS || self.registers[first..=last].iter().any(Option::is_some) {
            return Err(refused);
        }
        let mask = !(bar.size - 1);
        let kind = if wide { BAR_64_BIT } else { 0 };
        self.registers[first] = Some(BarRegister {
            value: low(bar.address) | kind,
            mask: low(mask) | kind,
            sizing: false,
            movable: !wide,
        });
        if wide {
            self.registers[last] = Some(BarRegister {
                value: low(bar.address >> 32),
                mask: low(mask >> 32),
                sizing: false,
                movable: false,
            });
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability and returns where it lies. `body` is what follows the two bytes of
    /// number and link; the bits set in `writable` (as long as `body`, or shorter) are the guest's.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, ConfigSpaceError> {
        let offset = self.free;
        let length = body.len() + 2;
        let no_room = ConfigSpaceError::CapabilityRoom(length);
        let Ok(pointer) = u8::try_from(offset) else { return Err(no_room) };
        if length > CONFIG_SIZE - offset || writable.len() > body.len() {
            return Err(no_room);
        }
        self.bytes[offset] = id;
        self.bytes[offset + 2..offset + length].copy_from_slice(body);
        self.writable[offset + 2..offset + 2 + writable.len()].copy_from_slice(writable);
        let link = self.last_capability.map_or(CAPABILITY_POINTER, |last| last + 1);
        self.bytes[link] = pointer;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = Some(offset);
        self.free = (offset + length).next_multiple_of(4);
        Ok(pointer)
    }

    /// The memory ranges, for [`super::PciFunction::bars`].
    pub fn bars(&self) -> Vec<Bar> {
        self.bars.clone()
    }

    /// Whether the guest has enabled bus mastering: without it a device must not touch memory.
    pub fn bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_MASTER != 0
    }

    /// The 16-bit register at `offset`; past the end it reads as all ones.
    pub fn word(&self, offset: usize) -> u16 {
        match self.bytes.get(offset..offset.saturating_add(2)) {
            Some(&[low, high]) => u16::from_le_bytes([low, high]),
            _ => u16::MAX,
        }
    }

    /// The guest reads; past the end it gets all ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.byte(at);
        }
    }

    /// The guest writes; past the end, and where nothing is writable, nothing happens.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let start = usize::from(offset);
        let end = (start + data.len()).min(CONFIG_SIZE);
        for (at, &byte) in (start..end).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (byte & mask);
        }
        for index in 0..BARS {
            self.write_bar(index, start, &data[..end - start]);
        }
    }

    /// What the guest can have changed.
    pub fn save(&self) -> ConfigSpaceState {
        ConfigSpaceState {
            version: STATE_VERSION,
            bytes: self.bytes.to_vec(),
            sizing: self.registers.map(|register| register.is_some_and(|r| r.sizing)),
            addresses: self.registers.map(|register| register.map_or(0, |r| r.value)),
        }
    }

    /// Puts back what [`ConfigSpace::save`] saved of a space laid out like this one. A state in which
    /// something else has changed than a guest can change is refused, and the space is of no more use.
    pub fn restore(&mut self, state: &ConfigSpaceState) -> Result<(), ConfigSpaceError> {
        if state.version != STATE_VERSION || state.bytes.len() != CONFIG_SIZE {
            return Err(ConfigSpaceError::State(state.version));
        }
        for (at, &byte) in state.bytes.iter().enumerate() {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (byte & mask);
        }
        for (index, &address) in state.addresses.iter().enumerate() {
            self.move_bar(index, address);
            if let Some(register) = &mut self.registers[index] {
                register.sizing = state.sizing[index];
            }
        }
        if self.save() == *state { Ok(()) } else { Err(ConfigSpaceError::Layout) }
    }

    fn byte(&self, at: usize) -> u8 {
        if (BAR0..BAR0 + 4 * BARS).contains(&at) {
            let (index, within) = ((at - BAR0) / 4, (at - BAR0) % 4);
            let value = self.registers[index].map_or(0, |register| register.shown());
            return value.to_le_bytes()[within];
        }
        self.bytes.get(at).copied().unwrap_or(0xff)
    }

    /// Takes from a write what falls into BAR `index`: either it makes the register all ones, or it
    /// is a new address.
    fn write_bar(&mut self, index: usize, start: usize, data: &[u8]) {
        let Some(register) = &mut self.registers[index] else { return };
        let base = BAR0 + 4 * index;
        let mut bytes = register.shown().to_le_bytes();
        let mut touched = false;
        for (at, &byte) in (start..).zip(data) {
            if (base..base + 4).contains(&at) {
                bytes[at - base] = byte;
                touched = true;
            }
        }
        if touched {
            let written = u32::from_le_bytes(bytes);
            register.sizing = written | 0xf == u32::MAX;
            if !register.sizing {
                self.move_bar(index, written);
            }
        }
    }

    /// Moves a BAR that can be moved to the address that the register's value says.
    fn move_bar(&mut self, index: usize, value: u32) {
        let Some(register) = &mut self.registers[index] else { return };
        if !register.movable {
            return;
        }
        // The mask keeps it aligned; its end is at most 4 GiB.
        register.value = value & register.mask;
        for bar in &mut self.bars {
            if usize::from(bar.index) == index {
                bar.address = u64::from(register.value);
            }
        }
    }
}

impl BarRegister {
    fn shown(&self) -> u32 {
        if self.sizing { self.mask } else { self.value }
    }
}

fn low(value: u64) -> u32 {
    // The half is meant.
    #[allow(clippy::cast_possible_truncation)]
    let half = value as u32;
    half
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1044,
        revision: 1,
        class: 0xff_00_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };

    fn dword(space: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn header_tells_who_it_is() {
        let mut space = ConfigSpace::new(&IDENTITY);
        assert_eq!(dword(&space, 0), 0x1044_1af4);
        assert_eq!(dword(&space, 8), 0xff00_0001);
        assert_eq!(dword(&space, 0x2c), 0x0040_1af4);
        space.write(0, &[0xff; 4]);
        assert_eq!(dword(&space, 0), 0x1044_1af4);
        assert_eq!(dword(&space, 0x0c) >> 16, 0, "header type 0");
    }

    #[test]
    fn only_known_command_bits_stick() {
        let mut space = ConfigSpace::new(&IDENTITY);
        assert!(!space.bus_master());
        space.write(4, &[0xff; 4]);
        assert_eq!(space.word(4), 0x0406);
        assert_eq!(space.word(6), 0, "status is not writable");
        assert!(space.bus_master());
    }

    #[test]
    fn a_narrow_bar_can_be_sized_and_moved() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let bar = Bar { index: 0, address: 0xc000_0000, size: 0x8000 };
        space.add_bar(bar).unwrap();
        assert_eq!(space.bars(), [bar]);
        assert_eq!(dword(&space, 0x10), 0xc000_0000);
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(dword(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0xd000_0000_u32.to_le_bytes());
        assert_eq!(dword(&space, 0x10), 0xd000_0000);
        space.write(0x10, &0xd123_4567_u32.to_le_bytes());
        assert_eq!(dword(&space, 0x10), 0xd123_0000, "whole sizes only");
        assert_eq!(space.bars(), [Bar { address: 0xd123_0000, ..bar }]);
        space.write(0x10, &[0xff; 4]);
        space.write(0x13, &[0xe0]);
        assert_eq!(dword(&space, 0x10), 0xe0ff_8000, "byte by byte, as a driver may");
        space.write(0x14, &u32::MAX.to_le_bytes());
        assert_eq!(dword(&space, 0x14), 0, "no such BAR");
    }

    #[test]
    fn a_wide_bar_takes_two_registers() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let bar = Bar { index: 2, address: 0x40_0000_0000, size: 1 << 33 };
        space.add_bar(bar).unwrap();
        assert_eq!(dword(&space, 0x18), BAR_64_BIT);
        assert_eq!(dword(&space, 0x1c), 0x40);
        space.write(0x18, &[0xff; 8]);
        assert_eq!(dword(&space, 0x18), BAR_64_BIT);
        assert_eq!(dword(&space, 0x1c), 0xffff_fffe);
        space.write(0x18, &[0, 0, 0, 0, 0x80, 0, 0, 0]);
        assert_eq!(space.bars(), [bar], "it stays");
        assert!(space.add_bar(Bar { index: 3, address: 0xc000_0000, size: 16 }).is_err());
    }

    #[test]
    fn bad_bars_are_refused() {
        let mut space = ConfigSpace::new(&IDENTITY);
        for (index, address, size) in [
            (0, 0xc000_0000, 0x1001),
            (0, 0xc000_0800, 0x1000),
            (6, 0xc000_0000, 0x1000),
            (5, 1 << 32, 0x1000),
            (0, u64::MAX - 0xfff, 0x1000),
            (0, 0xc000_0000, 0),
        ] {
            let bar = Bar { index, address, size };
            assert_eq!(space.add_bar(bar), Err(ConfigSpaceError::Bar(bar)));
        }
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let first = space.add_capability(0x09, &[14, 1, 0], &[]).unwrap();
        let second = space.add_capability(0x11, &[3, 0], &[0, 0xc0]).unwrap();
        assert_eq!(first, 0x40);
        assert_eq!(second, 0x48);
        assert_eq!(space.word(6), 0x10);
        assert_eq!(dword(&space, 0x34) & 0xff, 0x40);
        assert_eq!(space.word(0x40), 0x4809);
        assert_eq!(space.word(0x48), 0x0011);
        space.write(0x48, &[0xff; 4]);
        assert_eq!(dword(&space, 0x48), 0xc003_0011);
    }

    #[test]
    fn a_full_list_is_an_error() {
        let mut space = ConfigSpace::new(&IDENTITY);
        assert!(space.add_capability(9, &[0; 190], &[]).is_ok());
        assert_eq!(space.add_capability(9, &[0; 4], &[]), Err(ConfigSpaceError::CapabilityRoom(6)));
    }

    #[test]
    fn accesses_across_the_end_do_no_harm() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let mut data = [0; 8];
        space.read(0xfc, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        space.write(0xff, &[1, 2, 3, 4]);
        assert_eq!(space.word(0xff), u16::MAX);
    }

    #[test]
    fn state_survives_a_round_trip() {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(Bar { index: 0, address: 0xc000_0000, size: 0x1000 }).unwrap();
        space.write(4, &[6, 0]);
        space.write(0x10, &0xc010_0000_u32.to_le_bytes());
        space.write(0x10, &[0xff; 4]);
        let text = serde_json::to_string(&space.save()).unwrap();
        let mut other = ConfigSpace::new(&IDENTITY);
        other.add_bar(Bar { index: 0, address: 0xc000_0000, size: 0x1000 }).unwrap();
        other.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(other.save(), space.save());
        assert_eq!(dword(&other, 0x10), 0xffff_f000);
        assert_eq!(other.bars()[0].address, 0xc010_0000);
        let mut state = space.save();
        state.version = 9;
        assert_eq!(other.restore(&state), Err(ConfigSpaceError::State(9)));
    }

    /// A narrow BAR, a wide one and two capabilities, one of them with bits of the guest's.
    fn full() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.add_bar(Bar { index: 0, address: 0xc000_0000, size: 0x8000 }).unwrap();
        space.add_bar(Bar { index: 2, address: 1 << 38, size: 1 << 20 }).unwrap();
        space.add_capability(0x11, &[3, 0, 0, 0], &[0, 0xc0]).unwrap();
        space.add_capability(0x09, &[20, 5, 7], &[]).unwrap();
        space
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Whatever a guest writes, in any width and anywhere: what is not its to write stays, each
        /// BAR stays aligned and below 4 GiB or where it is, a read in pieces is one in one piece,
        /// and what is saved comes back.
        #[test]
        fn only_the_guests_bits_change(
            writes in prop::collection::vec(
                (any::<u8>(), prop::sample::select(vec![1_usize, 2, 4, 8]), any::<[u8; 8]>()),
                1..60,
            ),
        ) {
            let before = full();
            let mut space = full();
            for (offset, width, data) in writes {
                // Sizing, more often than by chance.
                let data = if data[7] < 64 { [0xff; 8] } else { data };
                space.write(offset, &data[..width]);
                for at in 0..CONFIG_SIZE {
                    prop_assert_eq!((space.bytes[at] ^ before.bytes[at]) & !before.writable[at], 0);
                }
                let [narrow, wide] = space.bars()[..] else { panic!("two BARs") };
                prop_assert_eq!(wide, before.bars()[1]);
                prop_assert_eq!((narrow.index, narrow.size), (0, 0x8000));
                prop_assert!(narrow.address.is_multiple_of(narrow.size));
                prop_assert!(narrow.address + narrow.size <= 1 << 32);
                let mut whole = [0; 8];
                space.read(offset, &mut whole);
                for (at, byte) in (usize::from(offset)..).zip(whole) {
                    let mut piece = [0];
                    match u8::try_from(at) {
                        Ok(at) => space.read(at, &mut piece),
                        Err(_) => piece = [0xff],
                    }
                    prop_assert_eq!(piece, [byte]);
                }
            }
            let mut other = full();
            other.restore(&space.save()).unwrap();
            prop_assert_eq!(other.save(), space.save());
            prop_assert_eq!(other.bars(), space.bars());
        }

        /// A restored state is either the one that would be saved, or refused.
        #[test]
        fn no_state_is_taken_in_part(
            at in 0..CONFIG_SIZE, byte in any::<u8>(), index in 0..BARS, address in any::<u32>(),
            sizing in any::<bool>(),
        ) {
            let mut space = full();
            let mut state = space.save();
            state.bytes[at] = byte;
            state.addresses[index] = address;
            state.sizing[index] = sizing;
            if space.restore(&state).is_ok() {
                prop_assert_eq!(space.save(), state);
            }
        }
    }
}
