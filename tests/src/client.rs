//! containerd's API, for what the suite itself wants to know and do often: a `ctr` takes the emulated
//! processor about as long as a small container does.

use std::cell::RefCell;
use std::path::Path;

use anyhow::{Context, Result};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    DeleteContainerRequest, DeleteTaskRequest, GetContainerRequest, GetImageRequest, GetRequest,
    KillRequest, WaitRequest,
};
use containerd_client::types::v1::{Process, Status};
use nix::sys::signal::Signal;
use tonic::transport::Channel;
use tonic::{Code, Request, Response};

use crate::wait::PATIENCE;

/// Where containerd listens.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// The namespace of containers that `ctr` makes.
const NAMESPACE: &str = "default";

/// A connection, and the runtime that drives it.
struct Client {
    tokio: tokio::runtime::Runtime,
    channel: Channel,
}

thread_local! {
    // A channel belongs to the runtime it was made on; each row has a thread of its own.
    static CLIENT: RefCell<Option<Client>> = const { RefCell::new(None) };
}

/// Makes a call; a connection that broke is made anew with the next one.
pub(crate) fn call<T, F>(call: impl FnOnce(Channel) -> F) -> Result<T>
where
    F: Future<Output = Result<Response<T>, tonic::Status>>,
{
    CLIENT.with_borrow_mut(|client| {
        let connected = if let Some(connected) = client.take() {
            connected
        } else {
            let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let channel =
                tokio.block_on(containerd_client::connect(SOCKET)).context("containerd")?;
            Client { tokio, channel }
        };
        let answer = connected.tokio.block_on(call(connected.channel.clone()));
        if !matches!(&answer, Err(status) if status.code() == Code::Unavailable) {
            *client = Some(connected);
        }
        Ok(answer?.into_inner())
    })
}

/// Returns a request about what is in a namespace.
pub(crate) fn named<T>(message: T, namespace: &str) -> Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.parse()?);
    Ok(request)
}

/// Returns whether containerd answers.
pub fn answers() -> bool {
    call(|channel| async move { VersionClient::new(channel).version(()).await }).is_ok()
}

/// Returns whether containerd has an image of that name.
pub fn has_image(name: &str) -> bool {
    named(GetImageRequest { name: name.to_owned() }, NAMESPACE).is_ok_and(|request| {
        call(|channel| async move { ImagesClient::new(channel).get(request).await }).is_ok()
    })
}

/// Returns what containerd says of a container's task.
pub fn task(id: &str) -> Result<Process> {
    task_in(NAMESPACE, id)
}

/// Returns what containerd says of the task of a container in `namespace`.
pub fn task_in(namespace: &str, id: &str) -> Result<Process> {
    let message = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
    let request = named(message, namespace)?;
    let answer = call(|channel| async move { TasksClient::new(channel).get(request).await })?;
    answer.process.context("no process")
}

/// Returns whether a container's task has that status, in the words of `ctr task ls`.
pub fn task_is(id: &str, status: &str) -> bool {
    let wanted = Status::from_str_name(status);
    task(id).is_ok_and(|task| Some(task.status()) == wanted)
}

/// Returns whether containerd has no task of that container.
pub fn is_gone(id: &str) -> bool {
    task(id).is_err_and(|error| {
        error.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == Code::NotFound)
    })
}

/// Kills a container's task and removes it, as `ctr task delete --force` does.
pub fn end_task(id: &str) -> Result<()> {
    let folder = task(id).ok().and_then(|task| fifo_folder(&task));
    let (container_id, exec_id) = (id.to_owned(), String::new());
    let kill = KillRequest {
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
        signal: Signal::SIGKILL as u32,
        all: true,
    };
    let request = named(kill, NAMESPACE)?;
    // A task that has ended cannot be killed, and is not waited for.
    if call(|channel| async move { TasksClient::new(channel).kill(request).await }).is_ok() {
        let wait = WaitRequest { container_id: container_id.clone(), exec_id };
        let mut request = named(wait, NAMESPACE)?;
        request.set_timeout(PATIENCE);
        let _ = call(|channel| async move { TasksClient::new(channel).wait(request).await });
    }
    let request = named(DeleteTaskRequest { container_id }, NAMESPACE)?;
    let deleted = call(|channel| async move { TasksClient::new(channel).delete(request).await });
    if let Some(folder) = folder {
        let _ = std::fs::remove_dir_all(folder);
    }
    deleted.map(drop)
}

/// Returns the folder of a task's FIFOs, which the client that is done with them removes.
fn fifo_folder(task: &Process) -> Option<std::path::PathBuf> {
    let files = [&task.stdin, &task.stdout, &task.stderr];
    let file = files.into_iter().find(|file| !file.is_empty())?;
    let folder = Path::new(file).parent()?;
    folder.starts_with("/run/containerd/fifo").then(|| folder.to_owned())
}

/// Removes a container and its snapshot, as `ctr container rm` does.
pub fn remove_container(id: &str) -> Result<()> {
    let request = named(GetContainerRequest { id: id.to_owned() }, NAMESPACE)?;
    let answer = call(|channel| async move { ContainersClient::new(channel).get(request).await })?;
    let container = answer.container.context("no container")?;
    let request = named(DeleteContainerRequest { id: id.to_owned() }, NAMESPACE)?;
    call(|channel| async move { ContainersClient::new(channel).delete(request).await })?;
    if !container.snapshot_key.is_empty() {
        let message = RemoveSnapshotRequest {
            snapshotter: container.snapshotter,
            key: container.snapshot_key,
        };
        let request = named(message, NAMESPACE)?;
        call(|channel| async move { SnapshotsClient::new(channel).remove(request).await })?;
    }
    Ok(())
}
