//! Port forwarding as the CRI does it: containerd dials a port of the pod namespace's loopback
//! address on the host, and means the one inside the pod, which is the guest's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use slog::{debug, warn};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::agent_client::AgentError;
use crate::container::Follower;
use crate::error::chain;
use crate::machine::StreamAddress;
use crate::resource::network::Loopback;

/// Connections at a time; more wait to be accepted. Each takes two descriptors of the shim's and two
/// of the machine's.
const MOST: usize = 128;

/// After an error of accepting, which may be a lack of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Forwards what is accepted to the guest, until it is aborted.
pub(super) async fn serve(loopback: Loopback, follower: Follower) {
    let room = Arc::new(Semaphore::new(MOST));
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        match loopback.accept().await {
            Ok((stream, dialled)) => {
                let follower = follower.clone();
                connections.spawn(async move {
                    forward(stream, dialled, &follower).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(follower.log, "network: cannot forward a port"; "error" => %error);
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn forward(mut outside: TcpStream, dialled: SocketAddr, follower: &Follower) {
    match connect(dialled, follower).await {
        Ok(mut inside) => {
            // Either side may break off; both are closed then.
            let _ = copy_bidirectional(&mut outside, &mut inside).await;
        }
        Err(error) => {
            debug!(follower.log, "network: port not forwarded"; "to" => %dialled, "error" => error);
            // As near to a refusal as it can be by now: the dialler hears of a reset.
            let _ = outside.set_zero_linger();
        }
    }
}

/// The guest's end of a connection to `dialled`.
async fn connect(dialled: SocketAddr, follower: &Follower) -> Result<UnixStream, String> {
    let agent = &follower.agent;
    let (port, ipv6) = (dialled.port(), dialled.is_ipv6());
    called_back(follower, |host| agent.forward_port(port, ipv6, host)).await
}

/// The connection that the agent makes to an address of the host's when `ask` has told it.
pub(super) async fn called_back<F>(
    follower: &Follower,
    ask: impl FnOnce(StreamAddress) -> F,
) -> Result<UnixStream, String>
where
    F: Future<Output = Result<(), AgentError>>,
{
    let listening = follower.machine.listen().await;
    let (address, stream) = listening.map_err(|error| chain(&error))?;
    if let Err(error) = ask(address).await {
        follower.machine.unlisten(address.port).await;
        return Err(chain(&error));
    }
    let stream = stream.await.map_err(|_| "the machine has ended".to_owned())?;
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true).map_err(|error| error.to_string())?;
    UnixStream::from_std(stream).map_err(|error| error.to_string())
}
