//! Properties of the mounts that the shared folder consists of.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use super::own_process;
use super::system::{Status, check, descriptor_name, read_link};

/// `statfs.f_type` of FUSE, whose server decides for itself whether sizes are true.
const FUSE: i64 = 0x6573_5546;
/// `statfs.f_type` of efivarfs, which counts blocks although it has none.
const EFIVARFS: i64 = 0xde5e_81e4;
const PROC: i64 = 0x9fa0;
/// File systems in memory, which count no blocks if they have no limit.
const IN_MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// Properties of one mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traits {
    /// The mount is a volume, or lies below one, and so belongs to the host. Other mounts belong to
    /// the sandbox alone.
    pub volume: bool,
    /// The host refuses to write by this mount.
    pub read_only: bool,
    /// A file's size is not the size of its content: the kernel or a FUSE server makes the content
    /// when it is read.
    pub made_on_reading: bool,
    /// The kernel makes the content, and a read may wait for an event.
    pub may_wait: bool,
    /// How often the agent had asked for the validity when the guest entered the mount.
    pub entered: u64,
    /// The number of this process in the mounted procfs; `None` for other file systems.
    own_process: Option<u32>,
}

/// The properties of all mounts that the guest has entered, by mount id.
///
/// An id is used again after its mount is gone. The guest can reach the new mount by a lookup of its
/// root only, and that replaces the entry.
#[derive(Debug, Default)]
pub struct Mounts {
    known: RwLock<HashMap<u64, Traits>>,
    /// Name of the folder that has the volumes, in folders of their own or not.
    volumes: Option<Vec<u8>>,
}

impl Mounts {
    /// Mounts in a folder `volumes` in the shared folder, or in a folder of it, are volumes.
    pub fn new(volumes: Option<&str>) -> Self {
        Self { known: RwLock::default(), volumes: volumes.map(|name| name.as_bytes().to_vec()) }
    }

    /// Returns the properties of a mount that was entered before.
    pub fn of(&self, mount: u64) -> Traits {
        // No holder of the lock can panic half way, so poison means nothing; and so below.
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&mount).copied().unwrap_or_default()
    }

    /// Notes the mount whose root is `path`, reached from the mount `outer`, which may be a volume, when the
    /// agent had asked `asked` times.
    pub fn enter(
        &self,
        (outer, volume): (u64, bool),
        path: &File,
        status: &Status,
        asked: u64,
    ) -> io::Result<()> {
        let volume = self.of(outer).volume || volume;
        let traits = Traits { volume, ..traits(path, status)? };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let entered = known.get(&status.mount).map_or(asked, |before| before.entered);
        known.insert(status.mount, Traits { entered, ..traits });
        Ok(())
    }

    /// Forgets all mounts.
    pub fn clear(&self) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Refuses what is in this process's folder in a procfs of the host's; `parent` is where it was
    /// looked up.
    pub fn admit(&self, parent: &File, status: &Status) -> io::Result<()> {
        match self.of(status.mount).own_process {
            Some(own) => own_process::admit(own, parent),
            None => Ok(()),
        }
    }

    /// Returns how many names `path`, which is in the shared folder's own mount or the root of a mount
    /// there, lies below the folder that has the volumes: 1 or 2; `None` if it does not.
    pub fn depth(&self, path: &File) -> io::Result<Option<usize>> {
        let Some(volumes) = &self.volumes else { return Ok(None) };
        let place = read_link(&descriptor_name(path))?;
        let mut above = Path::new(OsStr::from_bytes(&place)).ancestors().skip(1).take(2);
        let found = above
            .position(|folder| folder.file_name().is_some_and(|name| name.as_bytes() == volumes));
        Ok(found.map(|position| position + 1))
    }
}

fn traits(path: &File, status: &Status) -> io::Result<Traits> {
    let mut found = MaybeUninit::<libc::statfs64>::zeroed();
    // SAFETY: `found` has room for one result.
    check(unsafe { libc::fstatfs64(path.as_raw_fd(), found.as_mut_ptr()) })?;
    // SAFETY: zeroed is a valid value, and the call has written over it.
    let found = unsafe { found.assume_init() };
    // The kernel sign-extends nothing here, but the C library's type is signed.
    let kind = found.f_type & 0xffff_ffff;
    // What has no blocks keeps no content.
    let may_wait = kind == EFIVARFS || (found.f_blocks == 0 && !IN_MEMORY.contains(&kind));
    let own_process =
        if kind == PROC && status.is_folder() { own_process::number_in(path) } else { None };
    Ok(Traits {
        volume: false,
        read_only: found.f_flags & libc::ST_RDONLY.cast_signed() != 0,
        made_on_reading: may_wait || kind == FUSE,
        may_wait: may_wait && kind != FUSE,
        entered: 0,
        own_process,
    })
}
