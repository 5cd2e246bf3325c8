//! Saved states of devices, of the transport and of what KVM holds, as somebody may have changed them.
//!
//! A state is refused, or it is what the device saves again; and a device that has taken one goes on
//! without harm.

use std::fmt::{Debug, Display};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use husk_vmm::bus::pci::{ConfigPorts, PciBus};
use husk_vmm::devices::legacy::{I8042, LimitedLog, PvPanic, Serial};
use husk_vmm::devices::virtio::VirtioDevice;
use husk_vmm::devices::virtio::transport::pci::VirtioPci;
use husk_vmm::machine::EndSignal;
use husk_vmm::vm::GuestMemory;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::json::bend;
use crate::parts::{self, Streams, Wires};
use crate::{file, kvm};

const MEMORY: usize = 0x4_0000;
const WINDOW: u64 = 0xc000_0000;
/// Turns of the event loop after a restore: a queue of 16 entries is done within a few.
const TURNS: usize = 256;
/// A driver of the modern kind.
const VERSION_1: u64 = 1 << 32;

pub(crate) const WORDS: &[&str] =
    &["live", "agreed", "driver", "found", "reset", "version", "positions", "plugged", "entries"];

/// A byte that chooses whose state it is, and the state or changes to a good one.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte() % 16;
    let rest = input.0;
    let memory = || GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let streams = Streams::default;
    match choice {
        0 => check(rest, parts::rng, |it| it.save(), |it, state| it.restore(state)),
        1 => check(rest, || parts::vsock(streams()), |it| it.save(), |it, state| it.restore(state)),
        2 => {
            let save =
                |(fs, _): &(_, _)| husk_vmm::devices::virtio::fs::Fs::save(fs).expect("idle");
            check(rest, parts::fs, save, |(it, _), state| it.restore(state));
        }
        3 => check(rest, || parts::mem(&memory()), |it| it.save(), |it, state| it.restore(state)),
        4 => check(rest, parts::net, |(it, _)| it.save(), |(it, _), state| it.restore(state)),
        5 => check(rest, || I8042::new(end()), |it| it.save(), |it, state| it.restore(state)),
        6 => serial(rest),
        7 => {
            let fresh = || PvPanic::new(WINDOW, end()).expect("a device");
            check(rest, fresh, |it| it.save(), |it, state| it.restore(state));
        }
        8 => {
            let bus = || Arc::new(PciBus::new(WINDOW, 1 << 20).expect("a bus"));
            let restore = |it: &mut ConfigPorts, state: &_| match it.restore(state) {
                true => Ok(()),
                false => Err("another version"),
            };
            check(rest, || ConfigPorts::new(bus()), |it| it.save(), restore);
        }
        9 => transport(rest, &memory(), parts::rng()),
        10 => transport(rest, &memory(), parts::vsock(streams())),
        11 => transport(rest, &memory(), parts::fs().0),
        12 => transport(rest, &memory(), parts::mem(&memory())),
        13 => transport(rest, &memory(), parts::net().0),
        14 => kvm::vcpu(rest),
        _ => kvm::machine(rest),
    }
}

fn end() -> Arc<EndSignal> {
    Arc::new(EndSignal::new().expect("a signal"))
}

/// The text of a state itself, or `good` with changes; if it is a state at all.
pub(crate) fn state<S: DeserializeOwned>(good: Value, rest: &[u8]) -> Option<S> {
    if rest.first() == Some(&b'{') {
        return serde_json::from_slice(rest).ok();
    }
    serde_json::from_value(bend(good, WORDS, &mut Input(rest))).ok()
}

fn check<D, S, E: Display>(
    rest: &[u8],
    fresh: impl Fn() -> D,
    save: impl Fn(&D) -> S,
    restore: impl Fn(&mut D, &S) -> Result<(), E>,
) where
    S: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut device = fresh();
    let good = serde_json::to_value(save(&device)).expect("JSON");
    let Some(state) = state::<S>(good, rest) else { return };
    match restore(&mut device, &state) {
        Err(error) => drop(error.to_string()),
        Ok(()) => assert_eq!(save(&device), state),
    }
}

fn serial(rest: &[u8]) {
    let log = || LimitedLog::new(file::of(b"").0, 1 << 10);
    let line = || EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
    let fresh = || Serial::new(line(), log());
    check(
        rest,
        fresh,
        |it| it.save(),
        |it, state| Serial::restore(state, line(), log()).map(|new| *it = new),
    );
}

/// A transport whose driver has set its queues up, and the device at work afterwards.
fn transport<D>(rest: &[u8], memory: &GuestMemory, device: D)
where
    D: VirtioDevice + MutEventSubscriber + Send + 'static,
{
    let device = Arc::new(Mutex::new(device));
    let wires: Arc<Wires> = Arc::default();
    let function = VirtioPci::new(device.clone(), memory.clone(), wires, WINDOW, parts::logger());
    let mut function = function.expect("a function");
    let mut good = serde_json::to_value(function.save()).expect("JSON");
    let needed = device.lock().expect("a lock").queues_needed(VERSION_1);
    good["common"]["status"]["phase"] = json!("live");
    good["common"]["driver_features"] = json!(VERSION_1);
    good["positions"] = json!(vec![json!({"next_avail": 0, "next_used": 0}); needed]);
    for (number, queue) in (0_u64..).zip(good["common"]["queues"].as_array_mut().expect("a list")) {
        let base = 0x1000 * number;
        queue["enabled"] = json!(true);
        queue["size"] = json!(queue["max_size"].as_u64().unwrap_or(0).min(16));
        queue["descriptors"] = json!(base);
        queue["available"] = json!(base + 0x400);
        queue["used"] = json!(base + 0x800);
        // A chain waits in each.
        let _ = memory.write_obj(1_u16, GuestAddress(base + 0x402));
        let _ = memory.write_obj(0x1_0000_u64, GuestAddress(base));
        let _ = memory.write_obj(64_u32, GuestAddress(base + 8));
    }
    let mut manager: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
        EventManager::new().expect("an event loop");
    manager.add_subscriber(device);
    let Some(state) = state(good, rest) else { return };
    match function.restore(&state) {
        Err(error) => drop(error.to_string()),
        Ok(()) => assert_eq!(function.save(), state),
    }
    // Whether or not it was taken: nobody has to be careful with what is left. A device whose rings
    // lie over one another may feed itself for ever, but then each of its turns has to end.
    for _ in 0..TURNS {
        if manager.run_with_timeout(0).expect("the event loop") == 0 {
            return;
        }
    }
}
