//! The common configuration structure (virtio 1.2, section 4.1.4.3).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::msix::NO_VECTOR;
use super::queue::QueueRegisters;
use super::status::{Phase, Status, Wish};
use crate::vm::GuestMemory;

/// Bytes of the structure: [`super::layout::COMMON_SIZE`].
const IMAGE: usize = 0x40;

/// Its registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    /// Offered by the device.
    pub device_features: u64,
    /// Chosen by the driver.
    pub driver_features: u64,
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// Device status.
    pub status: Status,
    /// Changes whenever device configuration does.
    pub config_generation: u8,
    queue_select: u16,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
}

/// What a write calls for beyond the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver has reset the device.
    Reset,
    /// The driver is ready.
    Activate,
    /// The driver did what it may not; the write was ignored.
    Refused(&'static str),
}

impl Common {
    /// After reset.
    pub fn new(device_features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            device_features,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: Status::RESET,
            config_generation: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    /// Back to the beginning.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self {
            config_generation: self.config_generation,
            ..Self::new(self.device_features, &sizes)
        };
    }

    /// Reads in any width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(image.iter().skip(start)) {
            *byte = *value;
        }
    }

    /// Writes a register in its own width, or half of a 64-bit one; anything else is refused.
    /// `accept` says what becomes of a vector number the driver chose.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        memory: &GuestMemory,
        accept: impl Fn(u16) -> u16,
    ) -> Effect {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else { return Effect::Refused("width") };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let [b0, b1, b2, b3, ..] = bytes;
        let byte = b0;
        let word = u16::from_le_bytes([b0, b1]);
        let dword = u32::from_le_bytes([b0, b1, b2, b3]);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = dword,
            (0x08, 4) => self.driver_feature_select = dword,
            (0x0c, 4) => return self.write_features(dword),
            (0x10, 2) => self.config_vector = accept(word),
            (0x14, 1) => return self.write_status(byte),
            (0x16, 2) => self.queue_select = word,
            (0x18 | 0x1a | 0x1c | 0x20..=0x34, _) => {
                return self.write_queue(offset, data.len(), value, memory, accept);
            }
            _ => return Effect::Refused("register"),
        }
        Effect::None
    }

    fn write_features(&mut self, half: u32) -> Effect {
        if self.status.phase() != Phase::Driver {
            return Effect::Refused("features out of turn");
        }
        let half = u64::from(half);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | half,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | half << 32,
            // There are no features past bit 63 yet.
            _ if half != 0 => return Effect::Refused("unknown feature"),
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        match self.status.write(value) {
            Wish::Reset => {
                self.reset();
                Effect::Reset
            }
            Wish::Stay => Effect::None,
            Wish::Forbidden => Effect::Refused("status"),
            Wish::Step(Phase::Agreed) => {
                let unknown = self.driver_features & !self.device_features;
                if unknown != 0 || self.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
                    return Effect::Refused("features");
                }
                self.status.enter(Phase::Agreed);
                Effect::None
            }
            Wish::Step(phase) => {
                self.status.enter(phase);
                if phase == Phase::Live { Effect::Activate } else { Effect::None }
            }
        }
    }

    fn write_queue(
        &mut self,
        offset: u64,
        len: usize,
        value: u64,
        memory: &GuestMemory,
        accept: impl Fn(u16) -> u16,
    ) -> Effect {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::Refused("no such queue");
        };
        // Here CVE-2026-5747 would have been stopped: a queue in use is never touched.
        if self.status.phase() != Phase::Agreed || queue.enabled {
            return Effect::Refused("queue out of turn");
        }
        let [b0, b1, ..] = value.to_le_bytes();
        let word = u16::from_le_bytes([b0, b1]);
        match (offset, len) {
            (0x18, 2) if queue.set_size(word) => {}
            (0x18, 2) => return Effect::Refused("queue size"),
            (0x1a, 2) => queue.vector = accept(word),
            (0x1c, 2) if word == 1 && queue.check(memory).is_ok() => queue.enabled = true,
            (0x1c, 2) => return Effect::Refused("queue cannot be enabled so"),
            (0x20, 4 | 8) => set_low(&mut queue.descriptors, len, value),
            (0x24, 4) => set_high(&mut queue.descriptors, value),
            (0x28, 4 | 8) => set_low(&mut queue.available, len, value),
            (0x2c, 4) => set_high(&mut queue.available, value),
            (0x30, 4 | 8) => set_low(&mut queue.used, len, value),
            (0x34, 4) => set_high(&mut queue.used, value),
            _ => return Effect::Refused("register"),
        }
        Effect::None
    }

    fn image(&self) -> [u8; IMAGE] {
        let mut image = [0; IMAGE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.device_features, self.device_feature_select));
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select));
        put(0x10, &self.config_vector.to_le_bytes());
        // `MAX_QUEUES` is far below the register's range.
        put(0x12, &u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        put(0x14, &[self.status.value(), self.config_generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size zero.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }
}

fn half(features: u64, select: u32) -> [u8; 4] {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = features.to_le_bytes();
    match select {
        0 => [b0, b1, b2, b3],
        1 => [b4, b5, b6, b7],
        _ => [0; 4],
    }
}

fn set_low(register: &mut u64, len: usize, value: u64) {
    *register = if len == 8 { value } else { *register & !0xffff_ffff | value & 0xffff_ffff };
}

fn set_high(register: &mut u64, value: u64) {
    *register = *register & 0xffff_ffff | value << 32;
}
