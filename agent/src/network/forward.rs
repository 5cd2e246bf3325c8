//! One connection from the host to a port of the guest's loopback device.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::host::{Address, Host, stream};

/// How long either side may take to be connected.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Nobody listens at the port.
    #[error("nothing listens at {address}, port {port}")]
    Refused {
        /// The loopback address.
        address: IpAddr,
        /// The TCP port.
        port: u16,
        /// The refusal.
        source: io::Error,
    },
    /// The way to the host.
    #[error("cannot connect to the host: {0}")]
    Host(#[source] io::Error),
}

/// Connects both and returns; what comes in by one goes out by the other until both have ended.
pub async fn forward(host: &Host, port: u16, ipv6: bool, to: Address) -> Result<(), ForwardError> {
    let address: IpAddr =
        if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let inside = patiently(TcpStream::connect((address, port))).await;
    let mut inside = inside.map_err(|source| ForwardError::Refused { address, port, source })?;
    let outside = patiently(async { stream(host.dial(to)?).await }).await;
    let mut outside = outside.map_err(ForwardError::Host)?;
    tokio::spawn(async move {
        // Either side may break off; both are closed then.
        let _ = copy_bidirectional(&mut inside, &mut outside).await;
    });
    Ok(())
}

async fn patiently<T>(connecting: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
