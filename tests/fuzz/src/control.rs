//! The control sockets, from both ends: what the machine and the file server are asked, and what they
//! may say to the shim once they were taken over.
//!
//! A packet that is understood is understood again as it is said again, and a role that is asked for
//! what cannot be says so, in messages that can be understood, and ends.

use std::fmt::Debug;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::LazyLock;
use std::time::Duration;

use husk_control::{
    FilesMessage, FilesRequest, MAX_DESCRIPTORS, MachineMessage, MachineRequest, PacketError,
    Request, receive, send, socket_pair,
};
use husk_runtime::machine::Machine;
use husk_vmm::{files, machine};
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessage, MsgFlags, Shutdown, sendmsg, shutdown};
use nix::unistd::{pipe2, read};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::input::Input;
use crate::{json, parts};

/// Nothing here waits for anything but the other end.
const PATIENCE: Duration = Duration::from_secs(15);

/// More would not fit into the socket, which nobody reads meanwhile.
const MOST_PACKETS: usize = 16;

/// Of no use as anything.
static NULL: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));

const WORDS: &[&str] = &[
    "boot",
    "listen",
    "accept",
    "unlisten",
    "connect",
    "pause",
    "metrics",
    "expect_end",
    "ensure_vcpus",
    "resize_memory",
    "add_network",
    "remove_network",
    "set_link",
    "serve",
    "folder",
    "channels",
    "vhost_user",
    "reply",
    "event",
    "ok",
    "err",
    "done",
    "connected",
    "memory",
    "connection",
    "ended",
    "reason",
    "failed",
    "error",
    "id",
    "port",
    "serving",
];

/// Good packets to change, for each reader.
const TEMPLATES: [&str; 4] = [
    r#"{"id": 1, "request": {"boot": {"kvm": 0, "kernel": 1, "initrd": 2, "command_line": "quiet",
        "vcpus": 1, "memory_mib": 64, "max_vcpus": 2, "max_memory_mib": 128,
        "console": {"log": 3, "limit": 5}, "shared_folder": {"tag": "husk", "channels": [4, 5]},
        "network": [{"id": "eth0", "queues": [6], "vhost": [7], "mac": [2, 0, 0, 0, 0, 1],
            "mtu": 1500, "receive_limit": {"bytes": {"size": 5, "burst": 0, "refill_ms": 9}}}]}}}"#,
    r#"{"serve": {"folder": 0, "channels": [1, 2], "vhost_user": 3}}"#,
    r#"{"reply": {"id": 1, "result": {"Ok": {"metrics": {"exits": 1, "vsock_streams": 2,
        "vsock_from_guest": 3, "vsock_to_guest": 4, "fuse_requests": 5, "network": [{"id": "eth0",
        "kernel": false, "received_packets": 1, "received_bytes": 2, "received_drops": 0,
        "sent_packets": 1, "sent_bytes": 2, "sent_drops": 0}]}}}}}"#,
    r#"{"failed": {"error": "no"}}"#,
];

/// Lines: a letter for the number of descriptors (`a` is none) and the packet's text, or bytes that
/// change a good one. The first byte chooses who reads them.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let reader = usize::from(input.byte()) % TEMPLATES.len();
    let packets: Vec<(usize, Vec<u8>)> = input
        .0
        .split(|&byte| byte == b'\n')
        .filter_map(<[u8]>::split_first)
        .take(MOST_PACKETS)
        .map(|(count, text)| {
            let count = usize::from(count.wrapping_sub(b'a')) % (MAX_DESCRIPTORS + 8);
            (count, json::text(text, TEMPLATES[reader], WORDS))
        })
        .collect();
    for (count, text) in &packets {
        match reader {
            0 => hear::<Request>(text, *count),
            1 => hear::<FilesRequest>(text, *count),
            2 => hear::<MachineMessage>(text, *count),
            _ => hear::<FilesMessage>(text, *count),
        }
    }
    let logger = parts::logger();
    match reader {
        0 => tell::<MachineMessage>(&packets, |socket| drop(machine::run(socket, &logger))),
        1 => tell::<FilesMessage>(&packets, |socket| drop(files::run(socket, &logger))),
        2 => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(shim(&packets));
        }
        _ => {}
    }
}

/// The shim's side of a machine that says these packets and dies: every request comes back.
async fn shim(packets: &[(usize, Vec<u8>)]) {
    let (ours, theirs) = socket_pair().expect("sockets");
    let (dead, death) = tokio::sync::oneshot::channel();
    let life = async move |_| death.await.unwrap_or_default();
    let machine = Machine::over(ours, 1, life, &parts::logger()).expect("a machine");
    let asked = async {
        tokio::join!(
            machine.request(MachineRequest::Pause, &[]),
            machine.request(MachineRequest::Metrics, &[]),
            machine.remove_network("eth0"),
            machine.listen_once(7),
        )
    };
    let said = async {
        // The requests are on their way by then.
        tokio::task::yield_now().await;
        for (count, text) in packets {
            if throw(&theirs, text, *count).is_err() {
                break;
            }
        }
        drop(theirs);
        dead.send("gone".to_owned()).expect("it is waited for");
    };
    let all = async { tokio::join!(asked, said) };
    let (answers, ()) = timeout(PATIENCE, all).await.expect("every request comes back");
    if let (_, _, _, Ok(stream)) = answers {
        // Or its sender is gone.
        drop(timeout(PATIENCE, stream).await.expect("a stream or none"));
    }
    timeout(PATIENCE, machine.end()).await.expect("an end");
}

/// Sends a packet as it is.
fn throw(socket: &OwnedFd, text: &[u8], count: usize) -> nix::Result<()> {
    throw_with(socket, text, count, NULL.as_fd())
}

fn throw_with(socket: &OwnedFd, text: &[u8], count: usize, it: BorrowedFd<'_>) -> nix::Result<()> {
    let descriptors: Vec<RawFd> = vec![it.as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = if count == 0 { &[][..] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], rights, flags, None).map(drop)
}

fn hear<T: Serialize + DeserializeOwned + PartialEq + Debug>(text: &[u8], count: usize) {
    let (ours, theirs) = socket_pair().expect("sockets");
    let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).expect("a pipe");
    if throw_with(&ours, text, count, writer.as_fd()).is_err() {
        return;
    }
    drop(writer);
    heard::<T>(&ours, &theirs, text.is_empty(), count);
    // Nobody holds the other end any more.
    assert_eq!(read(&reader, &mut [0]), Ok(0), "a descriptor is leaked");
}

fn heard<T>(ours: &OwnedFd, theirs: &OwnedFd, empty: bool, count: usize)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    match receive::<T>(theirs) {
        Ok(None) => assert!(empty && count == 0),
        Ok(Some(mut packet)) => {
            let taken = (0..count + 1).filter(|at| packet.take(*at).is_ok()).count();
            assert_eq!(taken, count);
            assert!(packet.take(0).is_err() && packet.take(usize::MAX).is_err());
            let nothing: [BorrowedFd<'_>; 0] = [];
            match send(ours, &packet.message, &nothing) {
                Ok(()) => {
                    let again = receive::<T>(theirs).expect("a packet").expect("a packet");
                    assert_eq!(again.message, packet.message);
                }
                // What was escaped is longer.
                Err(error) => assert!(matches!(error, PacketError::TooLarge), "{error}"),
            }
        }
        Err(error) => drop(error.to_string()),
    }
}

/// Has a role take the packets, to its end.
fn tell<T: DeserializeOwned>(packets: &[(usize, Vec<u8>)], role: impl FnOnce(OwnedFd)) {
    let (ours, theirs) = socket_pair().expect("sockets");
    for (count, text) in packets {
        // An empty packet without descriptors means that the shim is gone.
        if throw(&ours, text, *count).is_err() {
            break;
        }
    }
    shutdown(ours.as_fd().as_raw_fd(), Shutdown::Write).expect("a socket");
    role(theirs);
    loop {
        match receive::<T>(&ours) {
            Ok(Some(_)) => {}
            // A role that fails leaves packets unread.
            Ok(None) | Err(PacketError::Socket(_)) => return,
            Err(error) => panic!("{error}"),
        }
    }
}
