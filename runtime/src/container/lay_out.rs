//! The files of a container to be created.

use std::sync::Arc;

use husk_agent_protocols::agent;

use super::{ContainerError, CreateRequest};
use crate::resource::{ContainerShare, MemoryVolume, RootfsMount, Share, Volumes};
use crate::spec::{GuestSpec, Membership, PlacedVolume, translate};

/// A container whose files are laid out.
pub(super) struct LaidOut {
    pub request: CreateRequest,
    pub guest: GuestSpec,
    pub files: ContainerShare,
    /// Volumes that the guest lays out itself.
    pub memory: Vec<MemoryVolume>,
}

/// Returns the agent's message of a volume.
pub(super) fn wire(volume: MemoryVolume) -> agent::MemoryVolume {
    let mut message = agent::MemoryVolume::new();
    message.folder = volume.folder.to_string_lossy().into_owned();
    (message.name, message.volume) = (volume.name, volume.volume);
    (message.mode, message.uid, message.gid) = (volume.mode, volume.uid, volume.gid);
    (message.size, message.files) = (volume.size, volume.files);
    message
}

/// Translates the spec and lays out what it names in the shared folder.
pub(super) fn lay_out(
    request: CreateRequest,
    is_sandbox: bool,
    share: &Arc<Share>,
    volumes: &Volumes,
) -> Result<LaidOut, ContainerError> {
    let CreateRequest { id, bundle, spec, rootfs, .. } = &request;
    let mut spec = spec.clone();
    let annotations = spec.annotations().clone().unwrap_or_default().into_iter().collect();
    let alone = Membership::of(id, &annotations) == Membership::Alone;
    let memory = volumes.take_memory(&mut spec, id, alone);
    let mut guest = translate(spec, id, bundle, |path| volumes.kind(path))?;
    // The sandbox's own container has had them set when the sandbox started.
    if !is_sandbox {
        guest.refuse_sandbox_sysctls()?;
    }
    let mounted = [RootfsMount {
        kind: "bind".to_owned(),
        source: guest.root.to_string_lossy().into_owned(),
        options: vec!["rbind".to_owned()],
        ..RootfsMount::default()
    }];
    let rootfs = if rootfs.is_empty() { &mounted } else { rootfs.as_slice() };
    let taken = guest.volumes.iter().map(|(_, volume)| volumes.take(volume));
    let taken = taken.collect::<Result<Vec<_>, _>>()?;
    guest.place_volumes(taken.iter().map(|volume| PlacedVolume {
        name: volume.name(),
        read_only_by_host: volume.read_only_by_host(),
        procfs: volume.procfs(),
    }));
    let files = ContainerShare::create(share, id, rootfs, taken)?;
    Ok(LaidOut { request, guest, files, memory })
}
