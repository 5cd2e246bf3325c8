//! Devices driven by hand: queues in this program's own memory, with requests that are nearly right.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};

use super::Until;
use super::device::{Bar, Device};
use super::numbers::Numbers;

const PAGE: usize = 4096;
/// Pages for what requests hold.
const DATA: usize = 32;
/// Descriptors that are used of a queue.
const SIZE: u16 = 64;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// Takes every virtio device from its driver, vsock and folder last.
pub fn all(until: &Until, numbers: &mut Numbers) -> Result<()> {
    let devices = Device::virtio()?;
    ensure!(!devices.is_empty(), "no virtio devices");
    let data = (0..DATA).map(|_| Page::new()).collect::<Result<Vec<_>>>()?;
    let mut taken = Vec::new();
    for device in devices.iter().rev() {
        taken.push(Taken::new(device, numbers)?);
    }
    while until.goes_on() {
        let device = numbers.index(taken.len());
        let device = &mut taken[device];
        if numbers.one_in(200) {
            device.set_up(numbers);
        }
        device.submit(&data, numbers);
    }
    Ok(())
}

/// A page of this program's, and where it is in the machine.
struct Page {
    start: NonNull<u8>,
    address: u64,
}

impl Page {
    fn new() -> Result<Self> {
        let layout = Layout::from_size_align(PAGE, PAGE)?;
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).context("no memory")?;
        // SAFETY: just allocated. Written to, so that it is there.
        unsafe { start.write_volatile(1) };
        let virtual_page = u64::try_from(start.as_ptr().addr() / PAGE)?;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, virtual_page * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(frame != 0, "the kernel does not tell where pages are");
        Ok(Self { start, address: frame * 4096 })
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..PAGE).zip(bytes) {
            // SAFETY: within the page, which is never freed.
            unsafe { self.start.add(at).write_volatile(*byte) };
        }
    }
}

struct Queue {
    descriptors: Page,
    available: Page,
    used: Page,
    count: u16,
}

struct Taken {
    kind: u16,
    bar: Bar,
    queues: Vec<Queue>,
}

impl Taken {
    fn new(device: &Device, numbers: &mut Numbers) -> Result<Self> {
        let (kind, bar) = (device.kind().unwrap_or(0), device.bar()?);
        let mut queues = Vec::new();
        for _ in 0..bar.read(0x12, 2).min(8) {
            let (descriptors, available, used) = (Page::new()?, Page::new()?, Page::new()?);
            queues.push(Queue { descriptors, available, used, count: 0 });
        }
        let mut taken = Self { kind, bar, queues };
        taken.set_up(numbers);
        Ok(taken)
    }

    /// As the specification has it, but for a slip now and then.
    fn set_up(&mut self, numbers: &mut Numbers) {
        let bar = &self.bar;
        for status in [0, 1, 3] {
            bar.write(0x14, 1, status);
        }
        for half in [0, 1] {
            bar.write(0x00, 4, half);
            let offered = bar.read(0x04, 4);
            let wanted = if half == 0 && numbers.one_in(2) { numbers.any() } else { u64::MAX };
            bar.write(0x08, 4, half);
            bar.write(0x0c, 4, offered & wanted);
        }
        bar.write(0x14, 1, 11);
        for (number, queue) in (0..).zip(&mut self.queues) {
            queue.count = 0;
            queue.available.put(2, &[0; 2]);
            bar.write(0x16, 2, number);
            let slip = numbers.one_in(20);
            bar.write(0x18, 2, if slip { numbers.odd() } else { SIZE.into() });
            bar.write(0x1a, 2, numbers.below(4));
            let places =
                [(0x20, &queue.descriptors), (0x28, &queue.available), (0x30, &queue.used)];
            for (register, page) in places {
                let address = if numbers.one_in(30) { numbers.odd() } else { page.address };
                bar.write(register, 4, address & 0xffff_ffff);
                bar.write(register + 4, 4, address >> 32);
            }
            bar.write(0x1c, 2, 1);
        }
        bar.write(0x14, 1, 15);
    }

    /// Some chains into one queue, and a kick.
    fn submit(&mut self, data: &[Page], numbers: &mut Numbers) {
        let at = numbers.index(self.queues.len().max(1));
        let Some(queue) = self.queues.get_mut(at) else { return };
        let right = numbers.one_in(2);
        for slot in 0..SIZE {
            let page = &data[numbers.index(data.len())];
            let message = message(self.kind, numbers);
            let first = slot % 2 == 0;
            if first {
                page.put(0, &message);
            }
            let (mut address, mut length) = (page.address, 4096);
            if first && numbers.one_in(2) {
                length = u64::try_from(message.len()).unwrap_or(0);
            }
            let (mut flags, mut next) = (if first { NEXT } else { WRITABLE }, (slot + 1) % SIZE);
            if !right && numbers.one_in(4) {
                match numbers.below(4) {
                    0 => address = numbers.odd(),
                    1 => length = numbers.odd(),
                    2 => flags = u16::from(numbers.byte() & 7),
                    _ => next = u16::from(numbers.byte()),
                }
            }
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes()[..4]);
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            queue.descriptors.put(usize::from(slot) * 16, &bytes);
        }
        let count = 1 + u16::from(numbers.byte() & 15);
        for number in 0..count {
            let mut head = (u16::from(numbers.byte()) % SIZE) & !1;
            if !right && numbers.one_in(8) {
                head = u16::from(numbers.byte()) << numbers.below(9);
            }
            let place = usize::from(queue.count.wrapping_add(number) % SIZE);
            queue.available.put(4 + place * 2, &head.to_le_bytes());
        }
        // Now and then more than the queue holds.
        let jump = if numbers.one_in(100) { 0x1000 } else { count };
        queue.count = queue.count.wrapping_add(jump);
        queue.available.put(2, &queue.count.to_le_bytes());
        self.bar.write(0x1000 + at * 4, 2, u64::try_from(at).unwrap_or(0));
    }
}

/// What a device of this kind expects, nearly.
fn message(kind: u16, numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = vec![0; 40 + numbers.index(160)];
    numbers.fill(&mut bytes);
    let length = bytes.len();
    let put = |bytes: &mut Vec<u8>, offset: usize, value: u64, size: usize| {
        bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    };
    match kind {
        // FUSE: length, opcode, unique, node, user, group, process.
        26 => {
            let said =
                if numbers.one_in(8) { numbers.odd() } else { u64::try_from(length).unwrap_or(0) };
            put(&mut bytes, 0, said, 4);
            put(&mut bytes, 4, numbers.below(56), 4);
            put(
                &mut bytes,
                16,
                if numbers.one_in(4) { numbers.odd() } else { numbers.below(12) },
                8,
            );
            bytes[24..40].fill(0);
            // Flags, sizes, offsets that are small, and names.
            let names: [&[u8]; 6] =
                [b"..\0", b"../../etc/passwd\0", b"/\0", b"etc\0", b"\0", b"no end"];
            let name = names[numbers.index(names.len())];
            for at in (40..length).step_by(8) {
                let end = length.min(at + 8);
                let value = numbers.odd().to_le_bytes();
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            let at = [40, 48, 56][numbers.index(3)].min(length);
            let end = length.min(at + name.len());
            bytes[at..end].copy_from_slice(&name[..end - at]);
        }
        // vsock: source and destination, ports, length, type, operation, flags, credit.
        19 => {
            bytes.resize(length.max(44), 0);
            put(&mut bytes, 0, if numbers.one_in(8) { numbers.odd() } else { 3 }, 8);
            put(&mut bytes, 8, if numbers.one_in(8) { numbers.odd() } else { 2 }, 8);
            put(&mut bytes, 16, 1024 + numbers.below(4), 4);
            let host = if numbers.one_in(2) { 0xc000_0000 } else { 0x1_0000 };
            put(&mut bytes, 20, host + numbers.below(16), 4);
            put(&mut bytes, 24, if numbers.one_in(4) { numbers.odd() } else { 0 }, 4);
            put(&mut bytes, 28, 1, 2);
            put(&mut bytes, 30, numbers.below(9), 2);
        }
        // Memory: what is asked, where, how many blocks.
        24 => {
            put(&mut bytes, 0, numbers.below(5), 8);
            put(&mut bytes, 8, (1 << 28) + numbers.below(64) * (1 << 26), 8);
            put(&mut bytes, 16, if numbers.one_in(4) { numbers.odd() } else { 1 }, 2);
        }
        _ => {}
    }
    bytes
}
