//! Much of what costs the guest nothing.

use std::io::Write;

use anyhow::{Result, ensure};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::Until;
use super::device::{Bar, Device};
use super::numbers::Numbers;

/// Lines into the kernel's log, and so onto the console.
pub fn log(until: &Until) -> Result<()> {
    let path = "/dev/kmsg-attack";
    mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(1, 11))?;
    std::fs::write("/proc/sys/kernel/printk", "8 4 1 8")?;
    let mut log = std::fs::OpenOptions::new().write(true).open(path)?;
    let line = format!("<0>{}\n", "\u{1b}[2J panicked".repeat(60));
    while until.goes_on() {
        log.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Kicks of every queue, and interrupts that go where no interrupt belongs.
pub fn interrupts(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let bars: Vec<Bar> = Device::virtio()?.iter().map(Device::bar).collect::<Result<_>>()?;
    ensure!(!bars.is_empty(), "no virtio devices");
    while until.goes_on() {
        for bar in &bars {
            for _ in 0..256 {
                let queue = numbers.index(16);
                bar.write(0x1000 + queue * 4, 2, u64::try_from(queue)?);
            }
        }
        if numbers.one_in(4) {
            // The entropy device's, the last: an address anywhere in the interrupts' window, any vector.
            let (bar, vector) = (&bars[bars.len() - 1], numbers.index(2));
            bar.write(0x2000 + vector * 16, 4, 0xfee0_0000 + (numbers.below(256) << 12));
            bar.write(0x2000 + vector * 16 + 8, 4, numbers.below(0x800));
            bar.write(0x2000 + vector * 16 + 12, 4, numbers.below(2));
        }
    }
    Ok(())
}
