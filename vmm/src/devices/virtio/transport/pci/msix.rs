//! MSI-X (PCI local bus specification 3.0, section 6.8.2): table, pending bits, function mask.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::vector::{MaskableVector, NoVector};
use crate::devices::virtio::state::RestoreError;
use crate::vm::{MsiMessage, MsiVector};

/// The number by which drivers say "no vector".
pub const NO_VECTOR: u16 = 0xffff;
/// Bit of the message control register: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Bit of the message control register: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// The bits of message control that the guest may write.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;
const ENTRY: usize = 16;
/// Bit of an entry's last word: the vector is masked.
const ENTRY_MASK: u32 = 1;

struct Entry {
    message: MsiMessage,
    control: u32,
    vector: Arc<MaskableVector>,
}

/// The MSI-X state of a function.
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
}

/// A saved [`Msix`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    control: u16,
    entries: Vec<EntryState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryState {
    address_low: u32,
    address_high: u32,
    data: u32,
    control: u32,
    pending: bool,
}

impl Msix {
    /// One entry per vector, all masked.
    pub fn new(vectors: impl IntoIterator<Item = Box<dyn MsiVector>>) -> Self {
        let entries = vectors
            .into_iter()
            .map(|wire| Entry {
                message: MsiMessage::default(),
                control: ENTRY_MASK,
                vector: Arc::new(MaskableVector::new(wire)),
            })
            .collect();
        Self { entries, control: 0 }
    }

    /// What a driver's choice of a vector becomes: itself, or "none" if there is no such vector.
    pub fn accept(&self, number: u16) -> u16 {
        if usize::from(number) < self.entries.len() { number } else { NO_VECTOR }
    }

    /// The interrupt source behind a number; one that does nothing for "none".
    pub fn vector(&self, number: u16) -> io::Result<Arc<dyn MsiVector>> {
        match self.entries.get(usize::from(number)) {
            Some(entry) => Ok(Arc::clone(&entry.vector) as Arc<dyn MsiVector>),
            None => Ok(Arc::new(NoVector::new()?)),
        }
    }

    /// Raises the interrupt of that number, if there is one.
    pub fn trigger(&self, number: u16) -> io::Result<()> {
        match self.entries.get(usize::from(number)) {
            Some(entry) => entry.vector.trigger(),
            None => Ok(()),
        }
    }

    /// The guest has written the message control register.
    pub fn set_control(&mut self, control: u16) -> io::Result<()> {
        let changed = (self.control ^ control) & CONTROL_WRITABLE != 0;
        self.control = control & CONTROL_WRITABLE;
        if changed { self.update(0..self.entries.len()) } else { Ok(()) }
    }

    /// Reads the table; past its end it reads as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.locate(at).map_or(0, |(index, within)| self.image(index)[within]);
        }
    }

    /// Writes the table, in any width; vectors touched take effect at once.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut touched: Option<(usize, usize)> = None;
        for (at, &byte) in (offset..).zip(data) {
            let Some((index, within)) = self.locate(at) else { continue };
            let mut image = self.image(index);
            image[within] = byte;
            let word = |from: usize| {
                u32::from_le_bytes([image[from], image[from + 1], image[from + 2], image[from + 3]])
            };
            let entry = &mut self.entries[index];
            entry.message =
                MsiMessage { address_low: word(0), address_high: word(4), data: word(8) };
            entry.control = word(12) & ENTRY_MASK;
            touched = Some((touched.map_or(index, |(first, _)| first), index));
        }
        match touched {
            Some((first, last)) => self.update(first..last + 1),
            None => Ok(()),
        }
    }

    /// Reads pending bits; past their end they read as zero.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| {
                    let entry = self.entries.get(first.saturating_add(*bit));
                    entry.is_some_and(|entry| entry.vector.is_pending())
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> MsixState {
        let entries = self.entries.iter().map(|entry| EntryState {
            address_low: entry.message.address_low,
            address_high: entry.message.address_high,
            data: entry.message.data,
            control: entry.control,
            pending: entry.vector.is_pending(),
        });
        MsixState { control: self.control, entries: entries.collect() }
    }

    /// Takes a saved state and wires the vectors anew.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), RestoreError> {
        if state.entries.len() != self.entries.len() {
            return Err(RestoreError::Mismatch("number of interrupt vectors"));
        }
        for (entry, saved) in self.entries.iter_mut().zip(&state.entries) {
            entry.message = MsiMessage {
                address_low: saved.address_low,
                address_high: saved.address_high,
                data: saved.data,
            };
            entry.control = saved.control & ENTRY_MASK;
            entry.vector.set_pending(saved.pending);
        }
        self.control = state.control & CONTROL_WRITABLE;
        Ok(self.update(0..self.entries.len())?)
    }

    /// The entry and the byte within at an offset of the table.
    fn locate(&self, offset: u64) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let index = offset / ENTRY;
        (index < self.entries.len()).then_some((index, offset % ENTRY))
    }

    fn image(&self, index: usize) -> [u8; ENTRY] {
        let entry = &self.entries[index];
        let mut image = [0; ENTRY];
        image[0..4].copy_from_slice(&entry.message.address_low.to_le_bytes());
        image[4..8].copy_from_slice(&entry.message.address_high.to_le_bytes());
        image[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        image[12..16].copy_from_slice(&entry.control.to_le_bytes());
        image
    }

    fn update(&self, range: std::ops::Range<usize>) -> io::Result<()> {
        let open = self.control & CONTROL_WRITABLE == ENABLE;
        for entry in &self.entries[range] {
            if open && entry.control & ENTRY_MASK == 0 {
                entry.vector.unmask(entry.message)?;
            } else {
                entry.vector.mask()?;
            }
        }
        Ok(())
    }
}
