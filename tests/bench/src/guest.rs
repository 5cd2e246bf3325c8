//! The one call the benchmark makes of the agent, written without a client: what a client library
//! and its runtime cost would be counted for both peers and hide the difference.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::Result;
use protobuf::Message;

/// Asks the agent at the other end to shut the guest down. The stream must stay open until the
/// guest has ended.
pub fn shut_down(stream: OwnedFd) -> Result<File> {
    let request = ttrpc::Request {
        service: "husk.agent.v1.Agent".to_owned(),
        method: "Shutdown".to_owned(),
        ..Default::default()
    }
    .write_to_bytes()?;
    let mut packet = Vec::from(ttrpc::MessageHeader::new_request(1, u32::try_from(request.len())?));
    packet.extend(request);
    let mut stream = File::from(stream);
    stream.write_all(&packet)?;
    Ok(stream)
}
