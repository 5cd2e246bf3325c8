//! The transport as a driver, good or hostile, sees it.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::layout::{BAR_SIZE, COMMON, DEVICE, ISR, NOTIFY, PENDING, TABLE};
use super::{VirtioPci, VirtioPciState};
use crate::bus::pci::PciFunction;
use crate::devices::virtio::state::{QueuePosition, RestoreError};
use crate::devices::virtio::testing::{MockWiring, logger};
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice};
use crate::vm::{GuestMemory, MsiMessage};

const ADDRESS: u64 = 0xc000_0000;
const RANGES: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 0x10_0000), (GuestAddress(0x1_0000_0000), 0x10_0000)];
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

#[derive(Default)]
struct TestDevice {
    active: Option<Activation>,
    resets: usize,
    refuse: bool,
    config: [u8; 8],
}

impl VirtioDevice for TestDevice {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 128]
    }
    fn features(&self) -> u64 {
        VERSION_1 | EVENT_IDX | 1
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (usize::try_from(offset).unwrap()..).zip(data) {
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::Queues { got: 0, wanted: 2 });
        }
        self.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.active = None;
        self.resets += 1;
    }
    fn positions(&self) -> Vec<QueuePosition> {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        queues
            .map(|queue| {
                use virtio_queue::QueueT;
                let queue = &queue.queue;
                QueuePosition { next_avail: queue.next_avail(), next_used: queue.next_used() }
            })
            .collect()
    }
}

struct Bench {
    device: Arc<Mutex<TestDevice>>,
    wiring: Arc<MockWiring>,
    pci: VirtioPci,
}

impl Bench {
    fn new() -> Self {
        let device = Arc::new(Mutex::new(TestDevice::default()));
        let wiring = Arc::new(MockWiring::default());
        let memory = GuestMemory::from_ranges(&RANGES).unwrap();
        let pci =
            VirtioPci::new(device.clone(), memory, wiring.clone(), ADDRESS, logger()).unwrap();
        Self { device, wiring, pci }
    }

    fn read(&mut self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.pci.bar_read(0, offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, len: usize, value: u64) {
        self.pci.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    fn status(&mut self, value: u64) -> u64 {
        self.write(COMMON + 0x14, 1, value);
        self.read(COMMON + 0x14, 1)
    }

    fn features(&mut self, features: u64) {
        self.write(COMMON + 8, 4, 0);
        self.write(COMMON + 0xc, 4, features & 0xffff_ffff);
        self.write(COMMON + 8, 4, 1);
        self.write(COMMON + 0xc, 4, features >> 32);
    }

    fn agree(&mut self) {
        for value in [0, 1, 3] {
            self.status(value);
        }
        self.features(VERSION_1 | EVENT_IDX);
        assert_eq!(self.status(11), 11);
    }

    fn queue(&mut self, index: u64, base: u64) {
        self.write(COMMON + 0x16, 2, index);
        self.write(COMMON + 0x18, 2, 16);
        self.write(COMMON + 0x1a, 2, index + 1);
        self.write(COMMON + 0x20, 8, base);
        self.write(COMMON + 0x28, 4, base + 0x1000);
        self.write(COMMON + 0x2c, 4, 0);
        self.write(COMMON + 0x30, 8, base + 0x2000);
        self.write(COMMON + 0x1c, 2, 1);
    }

    fn live(&mut self) {
        self.agree();
        self.queue(0, 0x1_0000);
        self.queue(1, 0x2_0000);
        assert_eq!(self.status(15), 15);
    }

    fn msix_control(&mut self, value: u16) {
        let at = self.capability(0x11, None) + 2;
        self.pci.config_write(at, &value.to_le_bytes());
    }

    /// Where the capability of that number (and virtio kind) lies.
    fn capability(&mut self, id: u8, kind: Option<u8>) -> u8 {
        let mut at = [0];
        self.pci.config_read(0x34, &mut at);
        while at[0] != 0 {
            let mut head = [0; 4];
            self.pci.config_read(at[0], &mut head);
            if head[0] == id && kind.is_none_or(|kind| head[3] == kind) {
                return at[0];
            }
            at[0] = head[1];
        }
        panic!("no such capability");
    }

    fn raised(&self, vector: usize) -> u32 {
        self.wiring.vectors.lock().unwrap()[vector].take()
    }
}

#[test]
fn the_function_says_what_it_is() {
    let mut bench = Bench::new();
    let mut id = [0; 4];
    bench.pci.config_read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
    for kind in 1..=5 {
        bench.capability(9, Some(kind));
    }
    assert_eq!(bench.wiring.vectors.lock().unwrap().len(), 3);
    let notify = bench.wiring.notify.lock().unwrap();
    let addresses: Vec<u64> = notify.iter().map(|(address, _)| *address).collect();
    assert_eq!(addresses, [ADDRESS + NOTIFY, ADDRESS + NOTIFY + 4]);
}

#[test]
fn a_good_driver_gets_there() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(COMMON + 0x12, 2), 2);
    bench.write(COMMON, 4, 1);
    assert_eq!(bench.read(COMMON + 4, 4), 1, "VERSION_1 in the high half");
    bench.live();
    let device = bench.device.lock().unwrap();
    let active = device.active.as_ref().unwrap();
    assert_eq!(active.features, VERSION_1 | EVENT_IDX);
    assert_eq!(active.queues.len(), 2);
    use virtio_queue::QueueT;
    assert_eq!(active.queues[1].queue.size(), 16);
    assert_eq!(active.queues[1].queue.used_ring(), 0x2_2000);
    assert!(active.queues[1].queue.event_idx_enabled());
}

#[test]
fn features_are_a_subset_with_version_1() {
    for bad in [0, EVENT_IDX, VERSION_1 | 2, VERSION_1 | 1 << 63] {
        let mut bench = Bench::new();
        for value in [1, 3] {
            bench.status(value);
        }
        bench.features(bad);
        assert_eq!(bench.status(11), 3, "{bad:x}");
        bench.features(VERSION_1);
        assert_eq!(bench.status(11), 11);
        bench.features(VERSION_1 | 1);
        bench.write(COMMON + 8, 4, 0);
        assert_eq!(bench.read(COMMON + 0xc, 4), 0, "settled");
    }
}

#[test]
fn queues_are_frozen_once_enabled_and_once_live() {
    let mut bench = Bench::new();
    bench.queue(0, 0x1_0000);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 0, "too early");
    bench.agree();
    bench.queue(0, 0x1_0000);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 1);
    bench.queue(0, 0x5_0000);
    assert_eq!(bench.read(COMMON + 0x20, 8), 0x1_0000);
    bench.queue(1, 0x2_0000);
    assert_eq!(bench.status(15), 15);
    for (offset, len, value) in
        [(0x18, 2, 8), (0x1a, 2, 0), (0x1c, 2, 0), (0x20, 8, 0x6_0000), (0x28, 4, 2), (0x30, 8, 4)]
    {
        let before = bench.read(COMMON + offset, len);
        bench.write(COMMON + offset, len, value);
        assert_eq!(bench.read(COMMON + offset, len), before, "register {offset:x}");
    }
    assert_eq!(bench.status(0), 0);
    assert_eq!(bench.device.lock().unwrap().resets, 1);
    bench.write(COMMON + 0x16, 2, 1);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 0);
    assert_eq!(bench.read(COMMON + 0x18, 2), 128);
    bench.live();
}

#[test]
fn rings_may_lie_above_four_gigabytes() {
    const HIGH: u64 = 0x1_0000_0000;
    let mut bench = Bench::new();
    bench.agree();
    for (register, address) in [(0x20, HIGH), (0x28, HIGH + 0x1000), (0x30, HIGH + 0x2000)] {
        bench.write(COMMON + register, 4, address & 0xffff_ffff);
        bench.write(COMMON + register + 4, 4, address >> 32);
        assert_eq!(bench.read(COMMON + register, 8), address);
    }
    bench.write(COMMON + 0x1c, 2, 1);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 1);
}

#[test]
fn bad_queues_cannot_be_enabled() {
    let mut bench = Bench::new();
    bench.agree();
    bench.queue(0, 0x0f_f000);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 0, "outside memory");
    bench.queue(0, 0x1_0008);
    assert_eq!(bench.read(COMMON + 0x1c, 2), 0, "not aligned");
    bench.write(COMMON + 0x16, 2, 2);
    assert_eq!(bench.read(COMMON + 0x18, 2), 0, "no such queue");
    bench.queue(9, 0x1_0000);
    bench.write(COMMON + 0x16, 2, 0);
    bench.write(COMMON + 0x1a, 2, 7);
    assert_eq!(bench.read(COMMON + 0x1a, 2), 0xffff, "no such vector");
}

#[test]
fn a_failed_activation_asks_for_reset() {
    let mut bench = Bench::new();
    bench.msix_control(0x8000);
    bench.write(TABLE + 12, 4, 0);
    bench.write(COMMON + 0x10, 2, 0);
    bench.device.lock().unwrap().refuse = true;
    bench.agree();
    bench.write(COMMON + 0x10, 2, 0);
    bench.queue(0, 0x1_0000);
    bench.queue(1, 0x2_0000);
    assert_eq!(bench.status(15), 0x4f);
    assert_eq!(bench.raised(0), 1);
    assert_eq!(bench.read(ISR, 1), 2);
    assert_eq!(bench.read(ISR, 1), 0, "reading acknowledges");
    bench.device.lock().unwrap().refuse = false;
    bench.live();

    let mut bench = Bench::new();
    bench.agree();
    bench.queue(1, 0x2_0000);
    assert_eq!(bench.status(15), 0x4f, "a queue is missing");
}

#[test]
fn interrupts_follow_table_and_masks() {
    let mut bench = Bench::new();
    bench.live();
    let interrupt =
        Arc::clone(&bench.device.lock().unwrap().active.as_ref().unwrap().queues[0].interrupt);
    interrupt.trigger().unwrap();
    assert_eq!(bench.raised(1), 0, "MSI-X is off");
    assert_eq!(bench.read(PENDING, 8), 0b10);
    bench.write(TABLE + 16, 8, 0xfee0_1000);
    bench.write(TABLE + 24, 4, 0x41);
    bench.write(TABLE + 28, 4, 0);
    bench.msix_control(0xc000);
    assert_eq!(bench.raised(1), 0, "all masked");
    bench.msix_control(0x8000);
    assert_eq!(bench.raised(1), 1, "what was pending");
    assert_eq!(bench.read(PENDING, 8), 0);
    let message = MsiMessage { address_low: 0xfee0_1000, address_high: 0, data: 0x41 };
    {
        let vectors = bench.wiring.vectors.lock().unwrap();
        assert_eq!(*vectors[1].routes.lock().unwrap(), [Some(message)]);
    }
    bench.write(TABLE + 28, 4, 1);
    interrupt.trigger().unwrap();
    assert_eq!(bench.raised(1), 0);
    bench.write(TABLE + 24, 4, 0x42);
    bench.write(TABLE + 28, 4, 0);
    assert_eq!(bench.raised(1), 1);
    interrupt.trigger().unwrap();
    assert_eq!(bench.raised(1), 1);
    let vectors = bench.wiring.vectors.lock().unwrap();
    let routes = vectors[1].routes.lock().unwrap();
    assert_eq!(*routes, [Some(message), Some(MsiMessage { data: 0x42, ..message })]);
}

#[test]
fn a_vector_raised_by_its_descriptor_is_unwired_while_masked() {
    let mut bench = Bench::new();
    bench.live();
    bench.write(TABLE + 16, 8, 0xfee0_1000);
    bench.msix_control(0x8000);
    let interrupt =
        Arc::clone(&bench.device.lock().unwrap().active.as_ref().unwrap().queues[0].interrupt);
    let event = interrupt.event().try_clone().unwrap();
    bench.write(TABLE + 28, 4, 0);
    assert_eq!(bench.read(PENDING, 8), 0);
    bench.write(TABLE + 28, 4, 1);
    event.write(1).unwrap();
    assert_eq!(bench.read(PENDING, 8), 0b10, "it waits in the descriptor");
    bench.write(TABLE + 28, 4, 0);
    let vectors = bench.wiring.vectors.lock().unwrap();
    let message = MsiMessage { address_low: 0xfee0_1000, address_high: 0, data: 0 };
    assert_eq!(*vectors[1].routes.lock().unwrap(), [Some(message), None, Some(message)]);
}

#[test]
fn notification_addresses_follow_the_bar() {
    let mut bench = Bench::new();
    let addresses = |bench: &Bench| -> Vec<u64> {
        bench.wiring.notify.lock().unwrap().iter().map(|(address, _)| *address).collect()
    };
    assert_eq!(addresses(&bench), [ADDRESS + NOTIFY, ADDRESS + NOTIFY + 4]);
    bench.pci.config_write(0x10, &[0xff; 4]);
    assert_eq!(addresses(&bench), [ADDRESS + NOTIFY, ADDRESS + NOTIFY + 4], "only sized");
    bench.pci.config_write(0x10, &0x1000_0000_u32.to_le_bytes());
    assert_eq!(addresses(&bench), [0x1000_0000 + NOTIFY, 0x1000_0000 + NOTIFY + 4]);
    let state = bench.pci.save();
    let mut other = Bench::new();
    other.pci.restore(&state).unwrap();
    assert_eq!(addresses(&other), addresses(&bench));
}

#[test]
fn nothing_reaches_a_device_that_was_unplugged() {
    let mut bench = Bench::new();
    bench.live();
    bench.pci.unplug();
    assert_eq!(bench.device.lock().unwrap().resets, 1);
    assert!(bench.wiring.notify.lock().unwrap().is_empty());
    for value in [1, 3] {
        bench.status(value);
    }
    bench.pci.config_write(0x10, &0x1000_0000_u32.to_le_bytes());
    assert_eq!(bench.read(COMMON + 0x14, 1), 0);
    assert!(bench.wiring.notify.lock().unwrap().is_empty());
}

#[test]
fn writes_to_notification_addresses_kick() {
    let mut bench = Bench::new();
    bench.write(NOTIFY + 4, 2, 1);
    bench.write(NOTIFY + 0xffc, 4, 1);
    let notify = bench.wiring.notify.lock().unwrap();
    assert!(notify[0].1.read().is_err());
    assert_eq!(notify[1].1.read().unwrap(), 1);
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let mut bench = Bench::new();
    let at = bench.capability(9, Some(5));
    bench.pci.config_write(at + 8, &0x14_u32.to_le_bytes());
    bench.pci.config_write(at + 12, &1_u32.to_le_bytes());
    bench.pci.config_write(at + 16, &[1]);
    let mut byte = [0];
    bench.pci.config_read(at + 16, &mut byte);
    assert_eq!(byte, [1]);
    assert_eq!(bench.read(COMMON + 0x14, 1), 1);
    // Past the BAR, another BAR, another length: nothing happens.
    bench.pci.config_write(at + 8, &u32::MAX.to_le_bytes());
    bench.pci.config_write(at + 16, &[3]);
    bench.pci.config_write(at + 8, &0x14_u32.to_le_bytes());
    bench.pci.config_write(at + 4, &[1]);
    bench.pci.config_write(at + 16, &[3]);
    bench.pci.config_write(at + 4, &[0]);
    bench.pci.config_write(at + 16, &[3, 0]);
    assert_eq!(bench.read(COMMON + 0x14, 1), 1);
}

#[test]
fn device_configuration_is_padded_with_zeroes() {
    let mut bench = Bench::new();
    bench.device.lock().unwrap().config = *b"husk\x01\x02\x03\x04";
    assert_eq!(bench.read(DEVICE, 4), u64::from(u32::from_le_bytes(*b"husk")));
    assert_eq!(bench.read(DEVICE + 6, 4), 0x0403);
    assert_eq!(bench.read(DEVICE + 0xdf8, 8), 0);
    let before = bench.read(COMMON + 0x15, 1);
    bench.pci.config_changed();
    assert_ne!(bench.read(COMMON + 0x15, 1), before);
}

#[test]
fn state_survives_a_round_trip() {
    let mut bench = Bench::new();
    bench.live();
    bench.msix_control(0x8000);
    bench.write(TABLE + 16, 8, 0xfee0_1000);
    bench.write(TABLE + 28, 4, 0);
    {
        use virtio_queue::QueueT;
        let mut device = bench.device.lock().unwrap();
        let queue = &mut device.active.as_mut().unwrap().queues[1].queue;
        queue.set_next_avail(7);
        queue.set_next_used(5);
    }
    let text = serde_json::to_string(&bench.pci.save()).unwrap();
    let state: VirtioPciState = serde_json::from_str(&text).unwrap();

    let mut other = Bench::new();
    other.pci.restore(&state).unwrap();
    assert_eq!(other.pci.save(), state);
    assert_eq!(other.read(COMMON + 0x14, 1), 15);
    {
        let vectors = other.wiring.vectors.lock().unwrap();
        assert_eq!(vectors[1].routes.lock().unwrap().len(), 1);
        let device = other.device.lock().unwrap();
        let positions = device.positions();
        assert_eq!(positions[1], QueuePosition { next_avail: 7, next_used: 5 });
    }

    let mut wrong = state.clone();
    wrong.version = 9;
    let error = Bench::new().pci.restore(&wrong).unwrap_err();
    assert!(matches!(error, RestoreError::Version { found: 9, known: 1 }), "{error}");
    let mut wrong = state.clone();
    wrong.common.queues[0].used = 1 << 40;
    assert!(matches!(Bench::new().pci.restore(&wrong), Err(RestoreError::Mismatch(_))));
    let mut wrong = state.clone();
    wrong.device_type = 1;
    assert!(matches!(Bench::new().pci.restore(&wrong), Err(RestoreError::Mismatch(_))));
    // More queues at work than the driver has set up.
    let mut wrong = state;
    wrong.positions.push(QueuePosition::default());
    assert!(matches!(Bench::new().pci.restore(&wrong), Err(RestoreError::Mismatch(_))));
}

proptest! {
    /// Whatever is written where: no panic, no status backwards, no live device without its queues.
    #[test]
    fn any_access_is_survived(
        accesses in prop::collection::vec((any::<bool>(), 0..BAR_SIZE, 0_usize..4, any::<u64>()), 1..200),
        low in prop::collection::vec((0_u64..0x40, 0_usize..4, any::<u64>()), 1..200),
    ) {
        let mut bench = Bench::new();
        bench.agree();
        let low = low.into_iter().map(|(offset, width, value)| (true, offset, width, value));
        for (write, offset, width, value) in low.chain(accesses) {
            let len = 1 << width;
            if offset + len > BAR_SIZE {
                continue;
            }
            let len = usize::try_from(len).unwrap();
            if write {
                bench.write(offset, len, value);
            } else {
                bench.read(offset, len);
            }
            let config = u8::try_from(offset & 0xff).unwrap();
            if usize::from(config) + len <= 256 {
                bench.pci.config_write(config, &value.to_le_bytes()[..len]);
                let mut data = [0; 8];
                bench.pci.config_read(config, &mut data[..len]);
            }
        }
    }
}
