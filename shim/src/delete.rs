//! `delete`: clears up after a shim that is gone.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context::with_duration;
use husk_runtime::state::{self, Leftovers};
use nix::mount::{MntFlags, umount2};
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::time::timeout;

use crate::address::socket_path;
use crate::arguments::{Flags, StartOptions};

/// How long a shim that lives may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// How often, and how far apart, one that has been asked to end is looked at.
const LOOKS: usize = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// As if killed: nobody saw how the process ended.
const KILLED: u32 = 128 + 9;

/// Removes the socket of a shim that has not come as far as to write its record.
fn remove_socket(flags: &Flags, bundle: &Path) {
    let address = std::fs::read_to_string(bundle.join("address")).unwrap_or_else(|_| {
        let (namespace, address) = (flags.namespace.clone(), flags.address.clone());
        StartOptions { namespace, address, ..StartOptions::default() }.socket_address(&flags.id)
    });
    let path = socket_path(&address);
    // One that answers is another's: this container has joined its sandbox.
    if UnixStream::connect(&path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}

/// Whether the shim of the sandbox `flags.id` lives, does not know a container of that name (any more),
/// and has others.
fn serves_others(flags: &Flags, leftovers: &Leftovers) -> anyhow::Result<bool> {
    let Some(socket) = leftovers.socket() else { return Ok(false) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(lives_without(socket, &flags.id)))
}

async fn lives_without(socket: &Path, id: &str) -> bool {
    let address = format!("unix://{}", socket.display());
    let Ok(Ok(client)) = timeout(ANSWER, Client::connect(&address)).await else { return false };
    let task = TaskClient::new(client);
    let knows = || async {
        let request = ConnectRequest { id: id.to_owned(), ..ConnectRequest::default() };
        task.connect(with_duration(ANSWER), &request).await.map(|answer| answer.task_pid != 0)
    };
    if !matches!(knows().await, Ok(false)) {
        return false;
    }
    // One that has nothing left ends.
    let shutdown = ShutdownRequest { id: id.to_owned(), ..ShutdownRequest::default() };
    if task.shutdown(with_duration(ANSWER), &shutdown).await.is_err() {
        return false;
    }
    for _ in 0..LOOKS {
        tokio::time::sleep(PAUSE).await;
        if !matches!(knows().await, Ok(false)) {
            return false;
        }
    }
    true
}

/// Removes whatever the sandbox `flags.id` has left, and prints how its container ended. For a
/// container that lives in another sandbox there is nothing to remove: that one's shim did it.
///
/// containerd calls this also when it has let go of a container, such as a pod's pause container that was
/// deleted before the others. Their shim lives, and they with it.
pub fn delete(flags: &Flags) -> anyhow::Result<()> {
    let bundle = if flags.bundle.is_empty() { "." } else { &flags.bundle };
    let leftovers = Leftovers::look(Path::new(state::ROOT), &flags.namespace, &flags.id);
    if !serves_others(flags, &leftovers)? {
        leftovers.clear()?;
        remove_socket(flags, Path::new(bundle));
    }
    // Nothing of ours is ever mounted there; a snapshotter may have been asked to. EINVAL and
    // ENOENT: nothing is.
    let _ = umount2(&Path::new(bundle).join("rootfs"), MntFlags::MNT_DETACH);
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(Timestamp::now()).into(),
        ..DeleteResponse::default()
    };
    let mut output = std::io::stdout();
    output.write_all(&response.write_to_bytes()?)?;
    output.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api::{ConnectResponse, Empty};
    use containerd_shim_protos::shim_async::{Task, create_task};
    use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
    use containerd_shim_protos::ttrpc::asynchronous::{Server, TtrpcContext};
    use containerd_shim_protos::ttrpc::{Error, Result};
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    /// A shim that has one container.
    struct Shim {
        id: &'static str,
        /// Whether it ends when it is asked to.
        ends: bool,
        ended: std::sync::atomic::AtomicBool,
    }

    #[async_trait]
    impl Task for Shim {
        async fn connect(
            &self,
            _: &TtrpcContext,
            asked: ConnectRequest,
        ) -> Result<ConnectResponse> {
            if self.ended.load(std::sync::atomic::Ordering::SeqCst) {
                return Err(Error::Others("gone".to_owned()));
            }
            let task_pid = u32::from(asked.id == self.id);
            Ok(ConnectResponse { task_pid, ..ConnectResponse::default() })
        }

        async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
            self.ended.store(self.ends, std::sync::atomic::Ordering::SeqCst);
            Ok(Empty::new())
        }
    }

    #[tokio::test]
    async fn only_a_shim_that_has_other_containers_is_left_alone() {
        for (id, ends, left_alone) in
            [("other", false, true), ("pause", false, false), ("other", true, false)]
        {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("s");
            assert!(!lives_without(&socket, "pause").await, "there is none");
            let listener = UnixListener::bind(&socket).unwrap();
            listener.set_nonblocking(true).unwrap();
            let shim = Shim { id, ends, ended: std::sync::atomic::AtomicBool::new(false) };
            let mut server = Server::new()
                .add_listener(Listener::try_from(listener).unwrap())
                .register_service(create_task(Arc::new(shim)));
            server.start().await.unwrap();
            assert_eq!(lives_without(&socket, "pause").await, left_alone, "{id} {ends}");
            server.shutdown().await.unwrap();
        }
    }
}
