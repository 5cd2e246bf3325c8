//! PCI functions, by what the kernel shows of them.

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// The function that tells the host of a panic: a write to it ends the machine.
const PVPANIC: u16 = 0x0011;
const VIRTIO: u16 = 0x1040;

pub struct Device {
    folder: PathBuf,
    config: File,
    number: u16,
}

impl Device {
    /// All that are there.
    pub fn all() -> Result<Vec<Self>> {
        let mut devices = Vec::new();
        for entry in std::fs::read_dir("/sys/bus/pci/devices")? {
            let folder = entry?.path();
            let config = OpenOptions::new().read(true).write(true).open(folder.join("config"))?;
            let mut number = [0; 2];
            config.read_exact_at(&mut number, 2)?;
            devices.push(Self { folder, config, number: u16::from_le_bytes(number) });
        }
        devices.sort_by(|one, other| one.folder.cmp(&other.folder));
        Ok(devices)
    }

    /// Those of virtio.
    pub fn virtio() -> Result<Vec<Self>> {
        Ok(Self::all()?.into_iter().filter(|device| device.kind().is_some()).collect())
    }

    pub fn is_pvpanic(&self) -> bool {
        self.number == PVPANIC
    }

    /// Virtio's number for what it is.
    pub fn kind(&self) -> Option<u16> {
        self.number.checked_sub(VIRTIO).filter(|kind| *kind < 0x40)
    }

    /// Writes into its configuration space; the kernel may refuse.
    pub fn write_config(&self, offset: u64, bytes: &[u8]) {
        let _ = self.config.write_at(bytes, offset);
    }

    pub fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        let _ = self.config.read_at(bytes, offset);
    }

    /// Takes it from its driver, which may wait for answers for ever: not longer than a second.
    pub fn unbind(&self) -> Result<()> {
        let name = self.folder.file_name().context("no name")?.to_owned();
        let file = OpenOptions::new().write(true).open(self.folder.join("driver/unbind"))?;
        let unbinding = std::thread::spawn(move || {
            let _ = file.write_at(name.as_encoded_bytes(), 0);
        });
        for _ in 0..20 {
            if unbinding.is_finished() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        // Its driver's end has switched it off.
        self.write_config(4, &[6, 4]);
        Ok(())
    }

    /// Its BAR.
    pub fn bar(&self) -> Result<Bar> {
        let path = self.folder.join("resource0");
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let length = NonZeroUsize::new(usize::try_from(file.metadata()?.len())?);
        let length = length.context("an empty BAR")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) };
        let start = start.with_context(|| path.display().to_string())?.cast();
        Ok(Bar { start, length: length.get() })
    }
}

/// A mapped BAR, for good.
pub struct Bar {
    start: NonNull<u8>,
    length: usize,
}

impl Bar {
    pub fn length(&self) -> usize {
        self.length
    }

    /// Writes 1, 2, 4 or 8 bytes to where they belong by their size; nothing beyond the end.
    pub fn write(&self, offset: usize, size: usize, value: u64) {
        let offset = offset & !(size - 1);
        if offset + size > self.length {
            return;
        }
        let [a, b, c, d, ..] = value.to_le_bytes();
        // SAFETY: within the mapping, aligned; nobody else in this program has to do with it.
        unsafe {
            let at = self.start.add(offset);
            match size {
                1 => at.write_volatile(a),
                2 => at.cast().write_volatile(u16::from_le_bytes([a, b])),
                4 => at.cast().write_volatile(u32::from_le_bytes([a, b, c, d])),
                _ => at.cast().write_volatile(value),
            }
        }
    }

    /// Reads as much.
    pub fn read(&self, offset: usize, size: usize) -> u64 {
        let offset = offset & !(size - 1);
        if offset + size > self.length {
            return 0;
        }
        // SAFETY: as for `write`.
        unsafe {
            let at = self.start.add(offset);
            match size {
                1 => at.read_volatile().into(),
                2 => at.cast::<u16>().read_volatile().into(),
                4 => at.cast::<u32>().read_volatile().into(),
                _ => at.cast::<u64>().read_volatile(),
            }
        }
    }
}
