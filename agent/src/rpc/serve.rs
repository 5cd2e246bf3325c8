//! Serves until the host hangs up or asks for the end.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{once, pending};
use husk_agent_protocols::agent_ttrpc::create_agent;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::init::power;
use crate::rpc::connection::Connection;
use crate::rpc::service::Service;
use crate::sandbox::Sandbox;

/// Serves `sandbox` on `connection`; comes back when it is time to end.
pub async fn serve(connection: Connection, sandbox: Arc<Sandbox>) -> io::Result<()> {
    let (ended, socket) = (connection.ended(), connection.duplicate()?);
    // One connection and never another: a stream that ended would end the server.
    let connections = once(async { Ok(connection) }).chain(pending());
    let service = Service::new(Arc::clone(&sandbox));
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(io::Error::other)?;
    tokio::select! {
        () = ended.notified() => {}
        () = sandbox.ending() => {
            // The answer to Shutdown is written by a task of the server: let it have its turn.
            for _ in 0..16 {
                tokio::task::yield_now().await;
            }
            power::flush(socket.as_fd()).await;
        }
    }
    Ok(())
}
