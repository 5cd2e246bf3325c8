//! From boot to the end, in each way there is.

use std::thread::sleep;
use std::time::Duration;

use husk_control::{EndReason, MachineRequest, MemorySize, Reply};

use super::guest::{self, Machine, kernel};

fn run(code: &[u8]) -> Option<(EndReason, Vec<u8>)> {
    let kvm = guest::kvm()?;
    let mut machine = Machine::new();
    assert_eq!(machine.boot(&kvm, &kernel(code), None, |_| ()), Ok(Reply::Done));
    let (reason, printed, result) = machine.end();
    assert_eq!(result.is_err(), matches!(reason, EndReason::Failed { .. }), "{reason}");
    Some((reason, printed))
}

#[test]
fn prints_and_resets() {
    let code = [guest::print(b"hello\n"), guest::RESET.to_vec()].concat();
    if let Some((reason, printed)) = run(&code) {
        assert_eq!(reason, EndReason::Reset);
        assert_eq!(printed, b"hello\n");
    }
}

#[test]
fn finds_the_host_bridge() {
    let code = [guest::print_config(0x8000_0000), guest::RESET.to_vec()].concat();
    if let Some((_, printed)) = run(&code) {
        assert_eq!(printed, [0x86, 0x80, 0x57, 0x0d]);
    }
}

#[test]
fn a_triple_fault_is_told() {
    match run(guest::TRIPLE_FAULT) {
        Some((EndReason::Failed { error }, _)) if error.contains("could not emulate") => {
            husk_skip::skipped("this KVM only emulates, and not that");
        }
        Some((reason, _)) => assert_eq!(reason, EndReason::TripleFault),
        None => {}
    }
}

#[test]
fn a_panic_is_told_and_not_the_reset_after_it() {
    let code = [guest::poke_first_bar(1), guest::RESET.to_vec()].concat();
    if let Some((reason, _)) = run(&code) {
        assert_eq!(reason, EndReason::Panicked);
    }
}

#[test]
fn pauses_resumes_and_counts() {
    let Some(kvm) = guest::kvm() else { return };
    // Prints for ever.
    let mut code = guest::print(b"x");
    code.extend([0xeb, 0xfd]);
    let mut machine = Machine::new();
    let early = machine.ask(MachineRequest::Pause).unwrap_err();
    assert!(early.contains("not been booted yet"), "{early}");
    let listen = MachineRequest::Listen { port: 1 };
    assert_eq!(machine.ask(listen), Ok(Reply::Done));
    assert_eq!(machine.boot(&kvm, &kernel(&code), None, |_| ()), Ok(Reply::Done));
    let exits = |machine: &mut Machine| match machine.ask(MachineRequest::Metrics) {
        Ok(Reply::Metrics(metrics)) => metrics.exits,
        other => panic!("{other:?}"),
    };
    for _ in 0..3 {
        assert_eq!(machine.ask(MachineRequest::Pause), Ok(Reply::Done));
        assert_eq!(machine.ask(MachineRequest::Pause), Ok(Reply::Done), "twice is no harm");
        let paused = exits(&mut machine);
        sleep(Duration::from_millis(20));
        assert_eq!(exits(&mut machine), paused, "nothing moves");
        assert_eq!(machine.ask(MachineRequest::Resume), Ok(Reply::Done));
        assert_eq!(machine.ask(MachineRequest::Resume), Ok(Reply::Done));
        while exits(&mut machine) == paused {}
    }
    let again = machine.boot(&kvm, &kernel(&code), None, |_| ()).unwrap_err();
    assert!(again.contains("already"), "{again}");
    let refused = machine.ask(MachineRequest::Connect { port: 7 }).unwrap_err();
    assert!(refused.contains("not ready"), "{refused}");
    // The shim goes: the machine goes too.
    machine.socket = None;
    assert!(machine.join().is_err());
}

#[test]
fn an_expected_reset_is_a_power_off() {
    let Some(kvm) = guest::kvm() else { return };
    let mut machine = Machine::new();
    // Asks the reset line's status 50000 times first, so that the shim can speak before the reset.
    let mut code = vec![0xb9, 0x50, 0xc3, 0x00, 0x00, 0x66, 0xba, 0x64, 0x00];
    code.extend([0xec, 0xff, 0xc9, 0x75, 0xfb]);
    code.extend(guest::RESET);
    machine.boot(&kvm, &kernel(&code), None, |_| ()).unwrap();
    machine.ask(MachineRequest::Pause).unwrap();
    machine.ask(MachineRequest::ExpectEnd).unwrap();
    machine.ask(MachineRequest::Resume).unwrap();
    assert_eq!(machine.end().0, EndReason::PoweredOff);
}

#[test]
fn many_vcpus_and_much_memory() {
    let Some(kvm) = guest::kvm() else { return };
    let mut machine = Machine::new();
    let booted = machine.boot(&kvm, &kernel(guest::RESET), None, |config| {
        config.vcpus = 32;
        config.memory_mib = 5000;
        config.console = None;
    });
    assert_eq!(booted, Ok(Reply::Done));
    assert_eq!(machine.end().0, EndReason::Reset);
}

#[test]
fn grows_while_it_runs() {
    let Some(kvm) = guest::kvm() else { return };
    let memory = |requested_mib, present_mib, added| {
        Ok(Reply::Memory(MemorySize { requested_mib, present_mib, added }))
    };
    let mut machine = Machine::new();
    let booted = machine.boot(&kvm, &kernel(guest::SPIN), None, |config| {
        config.max_vcpus = 4;
        config.max_memory_mib = 64 + 300;
    });
    assert_eq!(booted, Ok(Reply::Done));
    let vcpus = |machine: &mut Machine| match machine.ask(MachineRequest::Metrics) {
        Ok(Reply::Metrics(metrics)) => (metrics.vcpus, metrics.memory_mib),
        other => panic!("{other:?}"),
    };
    assert_eq!(vcpus(&mut machine), (1, 64));
    for (count, there) in [(2, 2), (1, 2)] {
        assert_eq!(machine.ask(MachineRequest::EnsureVcpus { count }), Ok(Reply::Done));
        assert_eq!(vcpus(&mut machine).0, there, "never fewer");
    }
    assert_eq!(machine.ask(MachineRequest::Pause), Ok(Reply::Done));
    assert_eq!(machine.ask(MachineRequest::EnsureVcpus { count: 4 }), Ok(Reply::Done));
    assert_eq!(machine.ask(MachineRequest::Resume), Ok(Reply::Done));
    assert_eq!(machine.ask(MachineRequest::Pause), Ok(Reply::Done));
    let refused = machine.ask(MachineRequest::EnsureVcpus { count: 5 }).unwrap_err();
    assert_eq!(refused, "5 vCPUs were asked for, and this machine can have 4");

    assert_eq!(machine.ask(MachineRequest::ResizeMemory { mib: 1 }), memory(64, 64, false));
    assert_eq!(machine.ask(MachineRequest::AwaitMemory), memory(64, 64, false));
    assert_eq!(machine.ask(MachineRequest::ResizeMemory { mib: 65 }), memory(192, 64, true));
    assert_eq!(machine.ask(MachineRequest::ResizeMemory { mib: 9999 }), memory(320, 64, false));
    // A guest that knows nothing of it takes nothing, until nothing is what it is to have.
    assert_eq!(machine.ask(MachineRequest::ResizeMemory { mib: 64 }), memory(64, 64, false));
    assert_eq!(machine.ask(MachineRequest::AwaitMemory), memory(64, 64, false));
    assert_eq!(vcpus(&mut machine), (4, 64));
    machine.socket = None;
    assert!(machine.join().is_err());

    let mut machine = Machine::new();
    machine.boot(&kvm, &kernel(guest::SPIN), None, |_| ()).unwrap();
    let refused = machine.ask(MachineRequest::ResizeMemory { mib: 65 }).unwrap_err();
    assert_eq!(refused, "this machine was built to have 64 MiB of memory and no more");
    assert_eq!(machine.ask(MachineRequest::ResizeMemory { mib: 64 }), memory(64, 64, false));
    assert_eq!(machine.ask(MachineRequest::AwaitMemory), memory(64, 64, false));
    machine.socket = None;
    assert!(machine.join().is_err());
}

#[test]
fn what_cannot_be_built_is_named() {
    let Some(kvm) = guest::kvm() else { return };
    let good = kernel(guest::SPIN);
    let empty = guest::file(b"");
    let garbage = guest::file(&[0xa5; 8192]);
    let refuse = |kernel, initrd, change: &dyn Fn(&mut husk_control::BootConfig)| {
        let mut machine = Machine::new();
        let error = machine.boot(&kvm, kernel, initrd, |config| change(config)).unwrap_err();
        assert!(machine.join().is_err());
        error
    };
    let error = refuse(&garbage, None, &|_| ());
    assert!(error.starts_with("the kernel is not an ELF file"), "{error}");
    let error = refuse(&good, Some(&empty), &|_| ());
    assert!(error.starts_with("the initrd is empty"), "{error}");
    let error = refuse(&good, None, &|config| config.memory_mib = 16);
    assert!(error.starts_with("16 MiB of memory is too little for this kernel"), "{error}");
    let error = refuse(&good, None, &|config| config.vcpus = 33);
    assert_eq!(error, "a machine has 1 to 32 vCPUs, not 33");
    let error = refuse(&good, None, &|config| config.kvm = 9);
    assert!(error.contains("names descriptor 9"), "{error}");
    let error = refuse(&good, None, &|config| {
        config.kvm = 2;
        config.console = None;
    });
    assert!(error.starts_with("the descriptor is not /dev/kvm"), "{error}");
    let error = refuse(&good, None, &|config| config.command_line = "x".repeat(3000));
    assert!(error.contains("3000 bytes"), "{error}");
}

#[test]
fn a_shim_that_wants_nothing_gets_nothing() {
    let mut machine = Machine::new();
    machine.socket = None;
    assert!(machine.join().is_ok());
}
