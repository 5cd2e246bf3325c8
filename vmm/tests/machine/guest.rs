//! Guests made of a few instructions.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{JoinHandle, spawn};

use husk_control::{
    BootConfig, Console, EndReason, Event, MachineMessage, MachineRequest, Packet, Reply, Request,
    receive, send, socket_pair,
};
use husk_vmm::machine::{MachineError, run};
use slog::{Discard, Logger, o};

/// Where the code is loaded and entered, in 64-bit mode.
pub const ENTRY: u64 = 0x100_0000;

/// Pulses the reset line, and again if that takes a moment.
pub const RESET: &[u8] = &[0x66, 0xba, 0x64, 0x00, 0xb0, 0xfe, 0xee, 0xf4, 0xeb, 0xfd];

/// Goes in circles.
pub const SPIN: &[u8] = &[0xeb, 0xfe];

/// Loads an empty interrupt table and interrupts itself.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x03, 0x00, 0xcc];

/// Writes `text` to the serial port.
pub fn print(text: &[u8]) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text {
        code.extend([0xb0, *byte, 0xee]);
    }
    code
}

/// Reads the configuration register of mechanism #1 at `address` and prints its four bytes.
pub fn print_config(address: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(address.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x0c, 0xef, 0x66, 0xba, 0xfc, 0x0c, 0xed]);
    code.extend([0x66, 0xba, 0xf8, 0x03]);
    for _ in 0..4 {
        code.extend([0xee, 0xc1, 0xe8, 0x08]);
    }
    code
}

/// Asks for the configuration register of mechanism #1 at `address` until something answers there,
/// or until nothing does.
pub fn await_config(address: u32, present: bool) -> Vec<u8> {
    let mut code = select_config(address);
    // in eax, dx; cmp eax, -1; back to the start while it is not as awaited
    code.extend([0xed, 0x83, 0xf8, 0xff, if present { 0x74 } else { 0x75 }, 0xec]);
    code
}

/// Writes the configuration register of mechanism #1 at `address`.
pub fn write_config(address: u32, value: u32) -> Vec<u8> {
    let mut code = select_config(address);
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.push(0xef);
    code
}

/// Prints the byte at an address below 1 GiB.
pub fn print_byte(address: u32) -> Vec<u8> {
    // mov al, [address]; mov dx, 0x3f8; out dx, al
    let mut code = vec![0x8a, 0x04, 0x25];
    code.extend(address.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    code
}

/// Selects a configuration register; the port of its data is in dx.
fn select_config(address: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(address.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x0c, 0xef, 0x66, 0xba, 0xfc, 0x0c]);
    code
}

/// Maps the first 2 MiB of BARs and writes `value` to the byte at 0xc0000000.
pub fn poke_first_bar(value: u8) -> Vec<u8> {
    vec![
        // mov qword [0xa018], 0xc003; mov eax, 0xc0000083; mov [0xc000], rax
        0x48, 0xc7, 0x04, 0x25, 0x18, 0xa0, 0x00, 0x00, 0x03, 0xc0, 0x00, 0x00, // a directory
        0xb8, 0x83, 0x00, 0x00, 0xc0, 0x48, 0x89, 0x04, 0x25, 0x00, 0xc0, 0x00, 0x00,
        // mov ebx, 0xc0000000; mov al, value; mov [rbx], al
        0xbb, 0x00, 0x00, 0x00, 0xc0, 0xb0, value, 0x88, 0x03,
    ]
}

/// An ELF file of one segment with that code.
pub fn kernel(code: &[u8]) -> File {
    let mut bytes = vec![0; 4096];
    bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(16, &[2, 0, 62, 0]);
    put(24, &ENTRY.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &[56, 0, 1, 0]);
    put(64, &[1, 0, 0, 0]);
    put(72, &4096_u64.to_le_bytes());
    put(88, &ENTRY.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    bytes.extend(code);
    file(&bytes)
}

/// A file with that content.
pub fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// /dev/kvm, if a guest's kernel runs on it; says so if not.
pub fn kvm() -> Option<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/kvm");
    match file {
        Ok(file) => Some(file.into()),
        Err(error) => {
            husk_skip::skipped(format_args!("/dev/kvm: {error}"));
            None
        }
    }
}

/// A machine in a thread, and the shim's end of its control socket.
pub struct Machine {
    pub socket: Option<OwnedFd>,
    pub log: File,
    thread: JoinHandle<Result<(), MachineError>>,
    next: u64,
}

impl Machine {
    /// A machine that has not been booted.
    pub fn new() -> Self {
        let (ours, theirs) = socket_pair().unwrap();
        let thread = spawn(move || run(theirs, &Logger::root(Discard, o!())));
        Self { socket: Some(ours), log: tempfile::tempfile().unwrap(), thread, next: 0 }
    }

    /// Asks it to boot `kernel`; the answer.
    pub fn boot(
        &mut self,
        kvm: &OwnedFd,
        kernel: &File,
        initrd: Option<&File>,
        change: impl FnOnce(&mut BootConfig),
    ) -> Result<Reply, String> {
        let log = self.log.try_clone().unwrap();
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![kvm.as_fd(), kernel.as_fd(), log.as_fd()];
        descriptors.extend(initrd.map(AsFd::as_fd));
        let mut config = BootConfig {
            kvm: 0,
            kernel: 1,
            initrd: initrd.map(|_| 3),
            command_line: "quiet".to_owned(),
            vcpus: 1,
            memory_mib: 64,
            max_vcpus: 0,
            max_memory_mib: 0,
            console: Some(Console { log: 2, limit: 4096 }),
            shared_folder: None,
            network: Vec::new(),
        };
        change(&mut config);
        self.ask_with(MachineRequest::Boot(Box::new(config)), &descriptors)
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, request: MachineRequest) -> Result<Reply, String> {
        self.ask_with(request, &[])
    }

    /// Asks with descriptors and waits for the answer.
    pub fn ask_with(
        &mut self,
        request: MachineRequest,
        with: &[BorrowedFd<'_>],
    ) -> Result<Reply, String> {
        self.next += 1;
        send(self.socket.as_ref().unwrap(), &Request { id: self.next, request }, with).unwrap();
        match self.hear().message {
            MachineMessage::Reply { id, result } => {
                assert_eq!(id, self.next);
                result
            }
            MachineMessage::Event(event) => panic!("{event:?} instead of an answer"),
        }
    }

    fn hear(&self) -> Packet<MachineMessage> {
        receive(self.socket.as_ref().unwrap()).unwrap().expect("the machine said nothing")
    }

    /// Waits for its end: why, and what the process would exit with.
    pub fn end_unread(self) -> (EndReason, Result<(), MachineError>) {
        let MachineMessage::Event(Event::Ended { reason }) = self.hear().message else {
            panic!("no end");
        };
        (reason, self.thread.join().unwrap())
    }

    /// Waits for its end: why, what it printed, and what the process would exit with.
    pub fn end(mut self) -> (EndReason, Vec<u8>, Result<(), MachineError>) {
        let MachineMessage::Event(Event::Ended { reason }) = self.hear().message else {
            panic!("no end");
        };
        let mut printed = Vec::new();
        self.log.rewind().unwrap();
        self.log.read_to_end(&mut printed).unwrap();
        (reason, printed, self.thread.join().unwrap())
    }

    /// Waits for the thread of a machine that was not to be, or whose shim has gone.
    pub fn join(self) -> Result<(), MachineError> {
        self.thread.join().unwrap()
    }
}
