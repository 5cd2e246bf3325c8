//! Configuration space, BARs and ports.

use std::arch::asm;

use anyhow::{Result, ensure};

use super::Until;
use super::device::{Bar, Device};
use super::numbers::Numbers;

/// Of the function's capability that reaches into BARs: everything behind the header.
const HEADER: u64 = 0x40;
/// Where common configuration, device configuration, notifications and MSI-X table begin.
const PARTS: [usize; 5] = [0, 0x100, 0x200, 0x1000, 0x2000];
/// The port whose command 0xfe ends the machine.
const RESET: u16 = 0x64;

/// Every register of every function; the address registers more often. What ends the machine by itself is
/// left out.
pub fn configuration(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let devices = Device::all()?;
    for device in &devices {
        for offset in (0..0x100).step_by(4) {
            for value in [u32::MAX, 0, 0xc000_4000, 0xfec0_0000, 0x1000] {
                device.write_config(offset, &value.to_le_bytes());
            }
        }
    }
    while until.goes_on() {
        let device = &devices[numbers.index(devices.len())];
        let offset = match numbers.below(4) {
            0 => 0x10 + numbers.below(0x18),
            1 => HEADER + numbers.below(0x60),
            2 => 4,
            _ => numbers.below(0x100),
        };
        let size = 1 << numbers.below(3);
        // On, so that the BAR is where it has been moved to.
        let bytes =
            if offset == 4 { [6, 4, 0, 0, 0, 0, 0, 0] } else { numbers.odd().to_le_bytes() };
        device.write_config(offset, &bytes[..size]);
        if numbers.one_in(4) {
            device.read_config(offset, &mut [0; 4][..size.min(4)]);
        }
    }
    Ok(())
}

/// The BARs of virtio's functions, while their drivers have them, then without; at last the one that ends
/// the machine.
pub fn bars(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let devices = Device::virtio()?;
    let bars: Vec<Bar> = devices.iter().map(Device::bar).collect::<Result<_>>()?;
    ensure!(!bars.is_empty(), "no virtio devices");
    // The vsock and the folder last, by which the attacker is reached.
    for (device, bar) in devices.iter().zip(&bars).rev() {
        for _ in 0..500 {
            register(bar, numbers);
        }
        device.unbind()?;
    }
    while until.goes_on() {
        register(&bars[numbers.index(bars.len())], numbers);
    }
    // The one that tells of a panic; the machine ends by that.
    for device in Device::all()?.iter().filter(|device| device.is_pvpanic()) {
        let bar = device.bar()?;
        for offset in (0..bar.length()).rev() {
            bar.write(offset, 1, numbers.any());
        }
        bar.write(0, 1, 1);
    }
    Ok(())
}

/// One access, half of them to where something is.
fn register(bar: &Bar, numbers: &mut Numbers) {
    let offset = match numbers.below(4) {
        0 => numbers.index(0x40),
        1 => PARTS[numbers.index(PARTS.len())] + numbers.index(0x40),
        // On the way to a live device: status, features, queues.
        2 => [0x14, 0x08, 0x0c, 0x16, 0x18, 0x1c, 0x20, 0x28, 0x30][numbers.index(9)],
        _ => numbers.index(bar.length()),
    };
    let size = 1 << numbers.index(4);
    let value = match offset {
        0x14 => [0, 1, 3, 11, 15, 0x80][numbers.index(6)],
        0x1c => 1,
        _ => numbers.odd(),
    };
    bar.write(offset, size, value);
    if numbers.one_in(8) {
        bar.read(offset, size);
    }
}

/// All ports; at last the one that ends the machine.
pub fn ports(until: &Until, numbers: &mut Numbers) -> Result<()> {
    // SAFETY: allows this process the use of ports; that is what it is for.
    let allowed = unsafe { libc::iopl(3) };
    ensure!(allowed == 0, "no ports: {}", std::io::Error::last_os_error());
    let mut port = 0_u16;
    while until.goes_on() {
        port = match numbers.below(4) {
            0 => port.wrapping_add(1),
            1 => 0xcf8 + u16::from(numbers.byte() & 7),
            2 => u16::from(numbers.byte()) | (0x300 * u16::from(numbers.byte() & 1)),
            _ => u16::try_from(numbers.below(0x1_0000))?,
        };
        // Their commands may reset the machine; that is for the end.
        if !(0x60..=RESET).contains(&port) {
            access(port, 1 << numbers.below(3), numbers.odd(), numbers.one_in(2));
        }
    }
    println!("ports done");
    for command in 0..=u8::MAX {
        access(0x60, 1, command.into(), true);
        access(RESET, 1, command.into(), true);
    }
    Ok(())
}

fn access(port: u16, size: u64, value: u64, write: bool) {
    let [a, b, c, d, ..] = value.to_le_bytes();
    let (byte, word, long) = (a, u16::from_le_bytes([a, b]), u32::from_le_bytes([a, b, c, d]));
    // SAFETY: ports have no part in this program's memory; what they do to the machine is what is tried.
    unsafe {
        match (size, write) {
            (1, true) => asm!("out dx, al", in("dx") port, in("al") byte),
            (2, true) => asm!("out dx, ax", in("dx") port, in("ax") word),
            (_, true) => asm!("out dx, eax", in("dx") port, in("eax") long),
            (1, false) => asm!("in al, dx", in("dx") port, out("al") _),
            (2, false) => asm!("in ax, dx", in("dx") port, out("ax") _),
            (_, false) => asm!("in eax, dx", in("dx") port, out("eax") _),
        }
    }
}
