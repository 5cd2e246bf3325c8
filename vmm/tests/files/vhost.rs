//! The vhost-user border, with a front end that has guest memory but no guest.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{Ordering, fence};

use husk_control::{FilesConfig, FilesMessage, FilesRequest, receive, send, socket_pair};
use tempfile::tempdir;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::client::{Entry, terminated, words};

const SIZE: u64 = 1 << 20;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const REQUEST: u64 = 0x3_0000;
const ANSWER: u64 = 0x4_0000;

struct FrontEnd {
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    turn: u16,
    _socket: Frontend,
}

impl FrontEnd {
    /// Sends one request in two descriptors and waits for its use; the answer's bytes.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + body.len()).unwrap();
        let mut message = words(&[length, opcode, 7, 0]);
        message.extend(node.to_ne_bytes());
        message.extend([0; 16]);
        message.extend_from_slice(body);
        self.exchange(&message, REQUEST)
    }

    fn exchange(&mut self, message: &[u8], at: u64) -> Vec<u8> {
        let put = |at: u64, bytes: &[u8]| {
            self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        };
        put(REQUEST, message);
        let length = u32::try_from(message.len()).unwrap();
        // Readable (next), then writable.
        put(0, &[&at.to_le_bytes()[..], &words(&[length, 1 | 1 << 16])].concat());
        put(16, &[&ANSWER.to_le_bytes()[..], &words(&[4096, 2])].concat());
        put(AVAILABLE + 4 + 2 * u64::from(self.turn % 16), &0_u16.to_le_bytes());
        self.turn += 1;
        fence(Ordering::SeqCst);
        put(AVAILABLE + 2, &self.turn.to_le_bytes());
        self.kick.write(1).unwrap();
        self.call.read().unwrap();
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.turn);
        let slot = USED + 4 + 8 * u64::from((self.turn - 1) % 16);
        let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        let mut answer = vec![0; length as usize];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        answer
    }
}

fn connect(path: &std::path::Path) -> FrontEnd {
    let mut socket = Frontend::connect(path, 2).unwrap();
    socket.set_owner().unwrap();
    // Without event indices, so that every answer is told.
    let features = socket.get_features().unwrap() & !(1 << 29);
    socket.set_features(features).unwrap();
    let protocol = socket.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::MQ));
    socket.set_protocol_features(protocol).unwrap();
    socket.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(socket.get_queue_num().unwrap(), 2);
    // SAFETY: the name is terminated, and the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
    file.set_len(SIZE).unwrap();
    let memory = GuestMemoryMmap::from_ranges_with_files([(
        GuestAddress(0),
        usize::try_from(SIZE).unwrap(),
        Some(FileOffset::new(file, 0)),
    )])
    .unwrap();
    let base = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let region = memory.find_region(GuestAddress(0)).unwrap();
    let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    socket.set_mem_table(&[region]).unwrap();
    let kick = EventFd::new(0).unwrap();
    let call = EventFd::new(0).unwrap();
    let ring = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: base,
        used_ring_addr: base + USED,
        avail_ring_addr: base + AVAILABLE,
        log_addr: None,
    };
    socket.set_vring_num(1, 16).unwrap();
    socket.set_vring_addr(1, &ring).unwrap();
    socket.set_vring_base(1, 0).unwrap();
    socket.set_vring_call(1, &call).unwrap();
    socket.set_vring_kick(1, &kick).unwrap();
    socket.set_vring_enable(1, true).unwrap();
    FrontEnd { memory, kick, call, turn: 0, _socket: socket }
}

#[test]
fn a_front_end_is_served_from_its_queues() {
    let folder = tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "twelve bytes").unwrap();
    let place = tempdir().unwrap();
    let path = place.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (control, theirs) = socket_pair().unwrap();
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let thread = std::thread::spawn(move || husk_vmm::files::run(theirs, &logger));
    let request = FilesRequest::Serve(FilesConfig {
        folder: 0,
        channels: Vec::new(),
        vhost_user: Some(1),
        volumes: None,
    });
    let shared = File::open(folder.path()).unwrap();
    send(&control, &request, &[shared.as_fd(), listener.as_fd()]).unwrap();
    let answer = receive::<FilesMessage>(&control).unwrap().unwrap();
    assert_eq!(answer.message, FilesMessage::Serving);

    let mut front = connect(&path);
    let mut init = words(&[7, 39, 1 << 20, u32::MAX, u32::MAX]);
    init.extend([0; 44]);
    let answer = front.call(26, 0, &init);
    assert_eq!(answer[4..8], [0; 4]);
    let answer = front.call(1, 1, &terminated("file"));
    assert_eq!(Entry::read(&answer[16..]).size, 12);
    let answer = front.call(1, 1, &terminated(".."));
    assert_eq!(answer[4..8], (-libc::EINVAL).to_ne_bytes());
    // What makes no sense comes back empty, and does not end anything: a message without an end, a
    // buffer outside of memory, and no message at all.
    front.call(6, 1, b"one\0");
    assert!(front.exchange(&[0; 40], SIZE - 8).is_empty());
    assert!(front.exchange(&[], REQUEST).is_empty());
    let answer = front.call(1, 1, &terminated("file"));
    assert_eq!(Entry::read(&answer[16..]).size, 12);
    drop(control);
    thread.join().unwrap().unwrap();
}
