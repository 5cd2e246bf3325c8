//! What a guest that was taken over may answer in its agent's place: frames of ttrpc, answers in them,
//! and the shim's calls at their other end.
//!
//! Every call comes back, at the latest when the guest has hung up, and with no more text than the host
//! is willing to keep.

use std::time::Duration;

use husk_agent_protocols::agent::{
    DiskUse, InterfaceUse, ListProcessesResponse, NetworkState, ProcessEntry, StartSandboxRequest,
    StartShellRequest, StatContainerResponse, UpdateNetworkResponse, WaitProcessResponse,
};
use husk_runtime::agent_client::{AgentClient, AgentError};
use husk_runtime::resource::network::Filter;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::input::Input;

/// A frame's header: length, stream, kind, flags.
const HEADER: usize = 10;
const RESPONSE: u8 = 2;
/// Longer texts are cut.
const LONGEST_TEXT: usize = 4096;
const MOST_TEXTS: usize = 32;
/// Calls that the body makes at once.
const CALLS: u32 = 8;
/// Nothing here waits for anything but the other end.
const PATIENCE: Duration = Duration::from_secs(15);

/// The guest's side of the connection.
pub fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let client = AgentClient::new(ours);
        let both = async { tokio::join!(calls(&client), guest(theirs, Input(data))) };
        timeout(PATIENCE, both).await.expect("every call comes back");
    });
}

/// One call of each kind whose answer says something.
async fn calls(client: &AgentClient) {
    let network = NetworkState::new();
    let (start, shell) = (StartSandboxRequest::new(), StartShellRequest::new());
    let (started, updated, created, listed, waited, used, killed, deleted) = tokio::join!(
        client.start_sandbox(&start),
        client.update_network(&network),
        client.start_shell(&shell),
        client.list_processes("c1"),
        client.wait_process("c1", ""),
        client.stat_container("c1"),
        client.wait_out_of_memory("c1", 0),
        client.delete_container("c1"),
    );
    if let Some((texts, filter)) = heard(updated) {
        assert!(texts.len() <= MOST_TEXTS);
        assert!(texts.iter().all(|text| text.chars().count() <= LONGEST_TEXT));
        // Nothing was told of a packet filter: nothing of it can be refused.
        assert!(Filter::default().refused(&filter).is_empty());
    }
    heard(started);
    heard(created);
    heard(listed);
    heard(waited);
    heard(used);
    heard(killed);
    heard(deleted);
}

fn heard<T>(result: Result<T, AgentError>) -> Option<T> {
    if let Err(AgentError::Refused { message, .. } | AgentError::Lost(message)) = &result {
        assert!(message.chars().count() <= LONGEST_TEXT);
    }
    result.ok()
}

/// Takes the calls, says what the input says, and hangs up.
async fn guest(mut stream: UnixStream, mut input: Input<'_>) {
    let mut header = [0; HEADER];
    for _ in 0..CALLS {
        stream.read_exact(&mut header).await.expect("a call");
        let [l0, l1, l2, l3, ..] = header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let mut call = vec![0; usize::try_from(length).expect("small")];
        stream.read_exact(&mut call).await.expect("a whole call");
    }
    while !input.is_empty() {
        let frame = frame(&mut input);
        if stream.write_all(&frame).await.is_err() {
            return;
        }
        // The shim has its turn.
        tokio::task::yield_now().await;
    }
}

/// A frame whose header is nearly right.
fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    if choice == 0xff {
        return (0..input.byte()).map(|_| input.byte()).collect();
    }
    let payload = match choice % 4 {
        0 => (0..input.byte()).map(|_| input.byte()).collect(),
        _ => response(input),
    };
    // Streams of a client are odd, from 1 on.
    let stream = match input.byte() {
        byte @ 0..=200 => u32::from(byte) % CALLS * 2 + 1,
        byte @ 201..=240 => u32::from(byte),
        _ => input.long(),
    };
    let kind = if input.byte() == 0 { input.byte() } else { RESPONSE };
    let flags = if input.byte() == 0 { input.byte() } else { 0 };
    let length = u32::try_from(payload.len()).expect("small");
    let length = if input.byte() == 0 { input.long() } else { length };
    let mut frame = [length, stream].map(u32::to_be_bytes).concat();
    frame.extend([kind, flags]);
    frame.extend(payload);
    frame
}

/// `ttrpc.Response`: a status, and an answer.
fn response(input: &mut Input<'_>) -> Vec<u8> {
    let mut response = ttrpc::proto::Response::new();
    let choice = input.byte();
    if choice & 1 == 1 {
        let code = i32::from(input.byte()) - 4;
        let mut status = ttrpc::proto::Status::new();
        status.code = protobuf::EnumOrUnknown::from_i32(code);
        status.message = "\u{e9}\n".repeat(usize::from(input.word()) % 8000);
        response.status = Some(status).into();
    }
    response.payload = match choice >> 1 & 7 {
        0 => (0..input.byte()).map(|_| input.byte()).collect(),
        1 => bytes(&UpdateNetworkResponse {
            refused: vec!["x".repeat(usize::from(input.word()) % 9000); input.byte().into()],
            ..Default::default()
        }),
        2 => bytes(&ListProcessesResponse {
            processes: (0..input.byte())
                .map(|exec| ProcessEntry {
                    pid: input.long(),
                    exec_id: exec.to_string(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
        3 => bytes(&WaitProcessResponse {
            exit_status: input.long(),
            exited_at_nanoseconds: i64::from(input.long()) << 33,
            ..Default::default()
        }),
        _ => bytes(&used(input)),
    };
    let mut bytes = bytes(&response);
    if choice & 0x80 != 0 {
        // Somewhere in it, something else.
        let at = usize::from(input.word()) % (bytes.len() + 1);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = input.byte();
        }
    }
    bytes
}

fn used(input: &mut Input<'_>) -> StatContainerResponse {
    let mut used = StatContainerResponse::new();
    used.memory_current = u64::MAX - u64::from(input.byte());
    for _ in 0..input.byte() {
        used.cpu_stat.insert(format!("{}_usec", input.byte()), u64::MAX);
        used.io_stat.push(DiskUse { major: input.long().into(), ..Default::default() });
        let name = "e".repeat(input.byte().into());
        used.interfaces.push(InterfaceUse { name, ..Default::default() });
    }
    used
}

fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("a message")
}
