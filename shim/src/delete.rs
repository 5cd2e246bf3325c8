//! `delete`: clears up after a shim that is gone.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use containerd_shim_protos::api::DeleteResponse;
use husk_runtime::state;
use nix::mount::{MntFlags, umount2};
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::address::socket_path;
use crate::arguments::{Flags, StartOptions};

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

/// Removes whatever the sandbox `flags.id` has left, and prints how its container ended. For a
/// container that lives in another sandbox there is nothing to remove: that one's shim did it.
pub fn delete(flags: &Flags) -> anyhow::Result<()> {
    state::clear(Path::new(state::ROOT), &flags.namespace, &flags.id)?;
    let bundle = if flags.bundle.is_empty() { "." } else { &flags.bundle };
    remove_socket(flags, Path::new(bundle));
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
