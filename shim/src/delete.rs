//! `delete`: clears up after a shim that is gone.

use std::io::Write;
use std::path::Path;

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use husk_runtime::state;
use nix::mount::{MntFlags, umount2};
use protobuf::Message;
use protobuf::well_known_types::timestamp::Timestamp;

/// As if killed: nobody saw how the process ended.
const KILLED: u32 = 128 + 9;

/// Removes whatever the sandbox `flags.id` has left, and prints how its container ended. For a
/// container that lives in another sandbox there is nothing to remove: that one's shim did it.
pub fn delete(flags: &Flags) -> anyhow::Result<()> {
    state::clear(Path::new(state::ROOT), &flags.namespace, &flags.id)?;
    let bundle = if flags.bundle.is_empty() { "." } else { &flags.bundle };
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
