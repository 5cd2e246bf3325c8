//! The capabilities of the function (virtio 1.2, section 4.1.4; MSI-X).

use super::layout;
use super::msix::CONTROL_WRITABLE;
use crate::bus::pci::{ConfigSpace, ConfigSpaceError};

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const DEVICE: u8 = 4;
const PCI_ACCESS: u8 = 5;
/// Bytes of a virtio capability, and of the one with a word more.
const LEN: u8 = 16;
const LONG: u8 = 20;
const BAR: u8 = 0;

/// Where capabilities that have registers lie in configuration space.
#[derive(Debug, Clone, Copy)]
pub struct Capabilities {
    /// MSI-X message control.
    pub msix_control: usize,
    /// The window through which configuration accesses reach the BAR: the capability's start.
    pub access: usize,
}

impl Capabilities {
    /// Adds them all.
    pub fn add(space: &mut ConfigSpace, vectors: usize) -> Result<Self, ConfigSpaceError> {
        // At most 256 vectors, so that the register holds their number less one.
        let last_vector = u16::try_from(vectors.saturating_sub(1)).unwrap_or(0x7ff) & 0x7ff;
        let mut body = last_vector.to_le_bytes().to_vec();
        body.extend(low(layout::TABLE).to_le_bytes());
        body.extend(low(layout::PENDING).to_le_bytes());
        let msix = space.add_capability(CAP_MSIX, &body, &CONTROL_WRITABLE.to_le_bytes())?;

        for (kind, offset, size) in [
            (COMMON, layout::COMMON, layout::COMMON_SIZE),
            (ISR, layout::ISR, layout::ISR_SIZE),
            (DEVICE, layout::DEVICE, layout::DEVICE_SIZE),
        ] {
            space.add_capability(CAP_VENDOR, &body_of(LEN, kind, offset, size), &[])?;
        }
        let mut notify = body_of(LONG, NOTIFY, layout::NOTIFY, layout::NOTIFY_SIZE);
        notify.extend(layout::NOTIFY_MULTIPLIER.to_le_bytes());
        space.add_capability(CAP_VENDOR, &notify, &[])?;

        let mut access = body_of(LONG, PCI_ACCESS, 0, 0);
        access.extend([0; 4]);
        // The driver chooses BAR, offset and length; the data never rest here.
        let mut writable = vec![0, 0, 0xff, 0, 0, 0];
        writable.extend([0xff; 8]);
        let access = space.add_capability(CAP_VENDOR, &access, &writable)?;
        Ok(Self { msix_control: usize::from(msix) + 2, access: usize::from(access) })
    }

    /// Whether an access of `len` bytes at `offset` is one of the window's data register.
    pub fn is_access_data(&self, offset: usize, len: usize) -> bool {
        let data = self.access + 16;
        offset == data && len <= 4
    }

    /// Where in the BAR the window looks, if the driver has set it to something sound.
    pub fn access_target(&self, space: &ConfigSpace, len: usize) -> Option<u64> {
        let word = |at: usize| {
            u32::from(space.word(self.access + at))
                | u32::from(space.word(self.access + at + 2)) << 16
        };
        let bar = space.word(self.access + 4).to_le_bytes()[0];
        let (offset, length) = (word(8), word(12));
        let sound = bar == BAR
            && matches!(length, 1 | 2 | 4)
            && usize::try_from(length) == Ok(len)
            && offset.is_multiple_of(length)
            && u64::from(offset) + u64::from(length) <= layout::BAR_SIZE;
        sound.then_some(u64::from(offset))
    }
}

fn body_of(len: u8, kind: u8, offset: u64, size: u64) -> Vec<u8> {
    let mut body = vec![len, kind, BAR, 0, 0, 0];
    body.extend(low(offset).to_le_bytes());
    body.extend(low(size).to_le_bytes());
    body
}

/// Offsets within the BAR are far below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
