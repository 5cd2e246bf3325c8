//! The border: containerd's messages on one side, the runtime's types on the other.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::{
    self, CreateTaskRequest, ExecProcessRequest, Mount, Status, UpdateTaskRequest,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use husk_runtime::apart;
use husk_runtime::container::{self, CreateRequest, ExecRequest, GuestProcess};
use husk_runtime::io::StdioPaths;
use husk_runtime::resource::RootfsMount;
use husk_runtime::spec::{self, SpecError, translate_process};
use oci_spec::runtime::{LinuxResources, Process};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::error::ServiceError;

/// The field of `ProcessDetails` that holds a process's pid in the guest. Clients know the message, and
/// show or ignore a field that they do not know; containerd numbers its own from 1.
const GUEST_PID: u32 = 1000;

/// What is to be created, and the fields of its spec that nobody here knows.
pub(super) async fn create_request(
    request: &CreateTaskRequest,
) -> Result<(CreateRequest, Vec<String>), ServiceError> {
    if !request.checkpoint.is_empty() {
        return Err(ServiceError::Unimplemented("creating a task from a checkpoint"));
    }
    let bundle = Path::new(&request.bundle);
    let path = bundle.join("config.json");
    let config = path.clone();
    let text = apart::opened(move || std::fs::read(config))
        .await
        .map_err(|error| ServiceError::Invalid(format!("{}: {error}", path.display())))?;
    let (spec, unknown) =
        spec::parse(&text).map_err(|error| ServiceError::Container(error.into()))?;
    let wanted = CreateRequest {
        id: request.id.clone(),
        bundle: bundle.to_path_buf(),
        spec,
        rootfs: request.rootfs.iter().map(mount).collect(),
        stdio: StdioPaths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
    };
    Ok((wanted, unknown))
}

pub(super) fn exec_request(request: &ExecProcessRequest) -> Result<ExecRequest, ServiceError> {
    let any = request.spec.as_ref().ok_or(ServiceError::Invalid("no process spec".to_owned()))?;
    let json = |error| ServiceError::Container(SpecError::Json(error).into());
    let mut spec: Process = serde_json::from_slice(&any.value).map_err(json)?;
    translate_process(&mut spec, "process")
        .map_err(|error| ServiceError::Container(error.into()))?;
    // containerd's own shim does so: what the process says of itself does not count.
    spec.set_terminal(Some(request.terminal));
    Ok(ExecRequest {
        exec_id: request.exec_id.clone(),
        spec,
        stdio: StdioPaths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        },
    })
}

pub(super) fn resources(request: &UpdateTaskRequest) -> Result<LinuxResources, ServiceError> {
    let any = request.resources.as_ref();
    let any = any.ok_or(ServiceError::Invalid("no resources to update".to_owned()))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| ServiceError::Invalid(format!("the resources to update: {error}")))
}

fn mount(mount: &Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9.
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

pub(super) fn status(status: container::Status) -> Status {
    match status {
        container::Status::Created => Status::CREATED,
        container::Status::Running => Status::RUNNING,
        container::Status::Paused => Status::PAUSED,
        container::Status::Stopped => Status::STOPPED,
    }
}

/// A process of the guest's. On the host all of them are one process, `machine`, by whose pid Create and
/// Start have named them; any other number could be that of a stranger. The guest's pid is in the details.
pub(super) fn process_info(machine: u32, entry: GuestProcess) -> api::ProcessInfo {
    let mut details = ProcessDetails { exec_id: entry.exec_id, ..ProcessDetails::default() };
    details.special_fields.mut_unknown_fields().add_varint(GUEST_PID, entry.pid.into());
    let info = Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        // Cannot fail: the message has no required fields.
        value: details.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    };
    api::ProcessInfo { pid: machine, info: Some(info).into(), ..api::ProcessInfo::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times() {
        let time = timestamp(UNIX_EPOCH + Duration::new(5, 7));
        assert_eq!((time.seconds, time.nanos), (5, 7));
        assert_eq!(timestamp(UNIX_EPOCH - Duration::from_secs(1)).seconds, 0);
    }

    #[tokio::test]
    async fn a_missing_spec_is_named() {
        let request = CreateTaskRequest { bundle: "/nowhere".to_owned(), ..Default::default() };
        let error = create_request(&request).await.unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/config.json: "), "{error}");
    }

    fn exec_on(terminal: bool, process: &str) -> Result<ExecRequest, ServiceError> {
        let any = Any { value: process.as_bytes().to_vec(), ..Any::default() };
        let request = ExecProcessRequest { spec: Some(any).into(), terminal, ..Default::default() };
        exec_request(&request)
    }

    #[test]
    fn the_streams_say_whether_an_exec_has_a_terminal() {
        for asked in ["true", "false"] {
            let process = format!(
                r#"{{"user":{{"uid":0,"gid":0}},"args":["x"],"cwd":"/","terminal":{asked}}}"#
            );
            for streams in [true, false] {
                let exec = exec_on(streams, &process).unwrap();
                assert_eq!((exec.spec.terminal(), exec.stdio.terminal), (Some(streams), streams));
            }
        }
    }

    #[test]
    fn a_process_has_the_machines_pid_and_tells_the_guests() {
        for (pid, exec_id) in [(1, ""), (4321, "one")] {
            let entry = GuestProcess { pid, exec_id: exec_id.to_owned() };
            let info = process_info(77, entry);
            assert_eq!(info.pid, 77);
            let details = ProcessDetails::parse_from_bytes(&info.info.value).unwrap();
            assert_eq!(details.exec_id, exec_id);
            let told = details.special_fields.unknown_fields().get(GUEST_PID);
            assert_eq!(told, Some(protobuf::UnknownValueRef::Varint(pid.into())));
        }
    }

    #[test]
    fn an_exec_without_a_command_is_refused() {
        let process = r#"{"user":{"uid":0,"gid":0},"args":[],"cwd":"/"}"#;
        let error = exec_on(false, process).unwrap_err().to_string();
        assert!(error.contains("process.args"), "{error}");
    }
}
