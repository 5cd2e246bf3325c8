//! What the agent makes of the host's requests before it does anything.
//!
//! The agent is in the guest, so a hostile request wins nothing; but a request that made it panic
//! would end the whole sandbox.

use husk_agent::requests;
use husk_agent_protocols::agent::{
    CreateContainerRequest, ExecProcessRequest, HostPort, Interface, NetworkState, NftablesMessage,
    NftablesTable, StartSandboxRequest, Streams, UpdateContainerRequest,
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use protobuf::Message;

use crate::input::Input;
use crate::{json, spec};

/// A byte that chooses the call and how it is made: as bytes of a message, or as changes to a good
/// one.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let raw = choice & 0x80 != 0;
    let terminal = choice & 0x40 != 0;
    match choice % 5 {
        0 => {
            let request = if raw { input.0.to_vec() } else { create(input.0, terminal) };
            let pid = (choice & 0x20 != 0).then_some(7);
            match requests::create_container(&request, pid) {
                Ok(spec) => check(&spec),
                Err(error) => drop(error.to_string()),
            }
        }
        1 => {
            let request = if raw { input.0.to_vec() } else { exec(input.0, terminal) };
            let _ = requests::exec_process(&request);
        }
        2 => {
            let request = if raw { input.0.to_vec() } else { update(input.0) };
            let _ = requests::update_container(&request);
        }
        3 => {
            let request = if raw { input.0.to_vec() } else { start(&mut input) };
            for file in requests::start_sandbox(&request).unwrap_or_default() {
                let text = file.to_str().expect("as the name was");
                assert!(text.starts_with("/proc/sys/") && !text.contains("/../"), "{text}");
                assert!(!text.ends_with("/.."), "{text}");
            }
        }
        _ => {
            let request = if raw { input.0.to_vec() } else { bytes(&network(&mut input)) };
            let _ = requests::update_network(&request);
        }
    }
}

fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("a message")
}

fn create(data: &[u8], terminal: bool) -> Vec<u8> {
    // Its paths are the guest's by now.
    let template = spec::TEMPLATE.replace("\"rootfs\"", "\"/run/husk/share/c1/rootfs\"");
    let stdin = Some(HostPort { port: 1, from: 2, ..Default::default() }).into();
    let streams = Streams { terminal, stdin, ..Default::default() };
    bytes(&CreateContainerRequest {
        container_id: "c1".to_owned(),
        spec: json::text(data, &template, spec::WORDS),
        streams: Some(streams).into(),
        ..Default::default()
    })
}

fn exec(data: &[u8], terminal: bool) -> Vec<u8> {
    let template = r#"{"user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": ["A=1"], "cwd": "/"}"#;
    let streams = Streams { terminal, rows: u32::MAX, ..Default::default() };
    bytes(&ExecProcessRequest {
        container_id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        process: json::text(data, template, &["terminal", "scheduler", "\0", "args", "cwd", ".."]),
        streams: Some(streams).into(),
        ..Default::default()
    })
}

fn update(data: &[u8]) -> Vec<u8> {
    let template = r#"{"memory": {"limit": 5}, "cpu": {"quota": 5, "period": 9}, "pids": {}}"#;
    bytes(&UpdateContainerRequest {
        container_id: "c1".to_owned(),
        resources: json::text(data, template, &["limit", "shares", "unified", "devices"]),
        ..Default::default()
    })
}

fn start(input: &mut Input<'_>) -> Vec<u8> {
    let mut request = StartSandboxRequest::new();
    request.clock_nanoseconds = i64::from(input.long()) << 32;
    for _ in 0..input.byte() % 8 {
        let length = usize::from(input.byte() % 32);
        let name: Vec<u8> = (0..length).map(|_| input.byte()).collect();
        let name = String::from_utf8_lossy(&name).into_owned();
        request.sysctls.insert(name, "1".to_owned());
    }
    request.network = Some(network(input)).into();
    bytes(&request)
}

/// Messages of rtnetlink: a header that names an interface, and attributes.
fn network(input: &mut Input<'_>) -> NetworkState {
    let mut state = NetworkState::new();
    while !input.is_empty() {
        let choice = input.byte();
        let list = match choice % 6 {
            0 => &mut state.addresses,
            1 => &mut state.routes,
            2 => &mut state.neighbours,
            3 => &mut state.rules,
            4 => {
                state.nftables.push(table(input));
                continue;
            }
            _ => {
                let name = format!("eth{}", input.byte());
                state.interfaces.push(Interface { name, ..Default::default() });
                continue;
            }
        };
        let mut message = vec![if choice & 0x80 != 0 { 10 } else { 2 }];
        message.extend((0..3).map(|_| input.byte()));
        message.extend(u32::from(input.byte() % 4).to_ne_bytes());
        message.extend((0..usize::from(choice >> 3 & 4)).map(|_| input.byte()));
        for _ in 0..input.byte() % 6 {
            let length = u16::from(input.byte() % 40);
            let kind = u16::from(input.byte() % 32);
            message.extend((length + u16::from(choice >> 3 & 8)).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend((0..length.saturating_sub(4).next_multiple_of(4)).map(|_| input.byte()));
        }
        list.push(message);
    }
    state
}

/// A table of nftables: a name of any length, and messages of any bytes.
fn table(input: &mut Input<'_>) -> NftablesTable {
    let mut table = NftablesTable::new();
    table.family = input.byte().into();
    table.name = "t".repeat(usize::from(input.byte()) * 300);
    for _ in 0..input.byte() % 4 {
        let mut message = NftablesMessage::new();
        message.kind = input.long();
        message.attributes = (0..input.byte() % 64).map(|_| input.byte()).collect();
        table.messages.push(message);
    }
    table
}

/// What libcontainer is handed.
fn check(spec: &Spec) {
    let linux = spec.linux().as_ref().expect("settings for Linux");
    let path = linux.cgroups_path().as_ref().expect("a cgroup");
    assert!(path.starts_with("/husk") && path.components().count() == 3, "{path:?}");
    let mut namespaces = linux.namespaces().iter().flatten();
    assert!(namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Mount));
    let hooks = spec.hooks().clone().unwrap_or_default();
    assert!(hooks.create_runtime().is_none() && hooks.poststop().is_none());
    let process = spec.process().as_ref().expect("a process");
    assert!(process.args().as_ref().is_some_and(|args| !args.is_empty()));
    assert!(process.cwd().is_absolute());
}
