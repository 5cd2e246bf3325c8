//! Network devices that are there at boot, come while the guest runs, and go.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use husk_control::{EndReason, MachineRequest, NetworkDevice, NetworkMetrics, Reply};

use super::guest::{self, Machine, kernel};

/// A queue of a tap that is nobody else's, in a network namespace that goes with it; none if that is
/// not allowed here.
fn tap() -> Option<OwnedFd> {
    let thread = husk_skip::spawn(|| {
        // SAFETY: takes a number; only this thread leaves its namespace.
        let left = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        if left != 0 || !Path::new("/dev/net/tun").exists() {
            husk_skip::skipped("no network namespace, or no /dev/net/tun");
            return None;
        }
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all zeroes is an empty request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        // SAFETY: the pointer is that of a request.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        Some(file.into())
    });
    thread.join().unwrap()
}

fn device(id: &str, queue: usize) -> NetworkDevice {
    NetworkDevice {
        id: id.to_owned(),
        queues: vec![queue],
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 7],
        mtu: None,
        receive_limit: None,
        send_limit: None,
    }
}

fn metrics(machine: &mut Machine) -> Vec<NetworkMetrics> {
    match machine.ask(MachineRequest::Metrics) {
        Ok(Reply::Metrics(metrics)) => metrics.network,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_comes_and_goes_while_the_guest_runs() {
    let (Some(kvm), Some(tap)) = (guest::kvm(), tap()) else { return };
    // Bridge, panic, sockets and entropy have the slots 0 to 3.
    let slot = 0x8000_2000;
    let bar = 0x1000_0000;
    let code = [
        guest::await_config(slot, true),
        guest::print_config(slot),
        guest::write_config(slot + 0x10, bar),
        guest::print_byte(bar + 0x12),
        guest::print_byte(bar + 0x206),
        guest::await_config(slot, false),
        guest::print_byte(bar + 0x12),
        guest::RESET.to_vec(),
    ];
    let mut machine = Machine::new();
    assert_eq!(machine.boot(&kvm, &kernel(&code.concat()), None, |_| ()), Ok(Reply::Done));
    assert!(metrics(&mut machine).is_empty());
    let add = |machine: &mut Machine, device, tap: &OwnedFd| {
        machine.ask_with(MachineRequest::AddNetwork(device), &[tap.as_fd()])
    };
    let refused = add(&mut machine, device("", 0), &tap).unwrap_err();
    assert_eq!(refused, "a network device's name has 1 to 64 bytes, not 0");
    let refused = add(&mut machine, device("eth0", 1), &tap).unwrap_err();
    assert!(refused.contains("names descriptor 1"), "{refused}");
    let refused = add(&mut machine, device("eth0", 0), &kvm).unwrap_err();
    assert!(refused.starts_with("network device \"eth0\": the descriptor is no tap"), "{refused}");
    machine.ask(MachineRequest::Pause).unwrap();
    assert_eq!(add(&mut machine, device("eth0", 0), &tap), Ok(Reply::Done));
    let refused = add(&mut machine, device("eth0", 0), &tap).unwrap_err();
    assert_eq!(refused, "there is a network device \"eth0\" already");
    let link = |id: &str, up| MachineRequest::SetLink { id: id.to_owned(), up };
    assert_eq!(machine.ask(link("eth0", false)), Ok(Reply::Done));
    assert_eq!(machine.ask(link("eth0", true)), Ok(Reply::Done));
    let refused = machine.ask(link("eth1", true)).unwrap_err();
    assert_eq!(refused, "there is no network device \"eth1\"");
    let [found] = &metrics(&mut machine)[..] else { panic!("not there") };
    assert_eq!((found.id.as_str(), found.kernel), ("eth0", false));
    machine.ask(MachineRequest::Resume).unwrap();
    // The guest has seen it when it has printed: it writes the register's number of queues last.
    while machine.log.metadata().unwrap().len() < 6 {
        std::thread::yield_now();
    }
    let remove = |id: &str| MachineRequest::RemoveNetwork { id: id.to_owned() };
    assert!(machine.ask(remove("eth1")).is_err());
    assert_eq!(machine.ask(remove("eth0")), Ok(Reply::Done));
    let (reason, printed, _) = machine.end();
    assert_eq!(reason, EndReason::Reset);
    // Vendor and device; three queues, and the link is up, where the guest has moved the BAR.
    assert_eq!(printed, [0xf4, 0x1a, 0x41, 0x10, 3, 1, 0xff]);
}

#[test]
fn slots_and_vectors_do_not_leak() {
    let (Some(kvm), Some(tap)) = (guest::kvm(), tap()) else { return };
    let mut machine = Machine::new();
    let booted = machine.ask_with(MachineRequest::Pause, &[]);
    assert!(booted.is_err(), "not booted yet");
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert_eq!(machine.boot(&kvm, &kernel(guest::SPIN), None, |_| ()), Ok(Reply::Done));
    let mut before = None;
    // A device has four vectors, three notification addresses and one slot of 32: 300 of them would
    // use up all there are.
    for _ in 0..300 {
        let add = MachineRequest::AddNetwork(device("eth0", 0));
        assert_eq!(machine.ask_with(add, &[tap.as_fd()]), Ok(Reply::Done));
        let remove = MachineRequest::RemoveNetwork { id: "eth0".to_owned() };
        assert_eq!(machine.ask(remove), Ok(Reply::Done));
        // Answered in the next turn of the event loop: the device's descriptors are closed.
        assert!(metrics(&mut machine).is_empty());
        before.get_or_insert_with(descriptors);
    }
    // Other tests run in this process: a leak would be of thousands.
    assert!(descriptors() < before.unwrap() + 200, "{} after {before:?}", descriptors());
    machine.socket = None;
    assert!(machine.join().is_err());
}

#[test]
fn a_device_is_there_at_boot() {
    let (Some(kvm), Some(tap)) = (guest::kvm(), tap()) else { return };
    let code = [guest::print_config(0x8000_2000), guest::RESET.to_vec()].concat();
    let mut machine = Machine::new();
    // In the place of the console's log, which goes without.
    machine.log = File::from(tap);
    let booted = machine.boot(&kvm, &kernel(&code), None, |config| {
        config.console = None;
        config.network = vec![device("eth0", 2)];
    });
    assert_eq!(booted, Ok(Reply::Done));
    let (reason, _) = machine.end_unread();
    assert_eq!(reason, EndReason::Reset);
}
