//! Memory that containers have for a volume: a tmpfs of the guest's instead of the host's.
//!
//! Such memory is charged to the containers that write to it, outlives each of them, and is found by all that
//! mount it.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Component, Path};

use husk_agent_protocols::MEMORY_VOLUMES_PATH;
use nix::mount::{MsFlags, mount};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::fs::{chownat, mkdirat, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// A volume to be made.
#[derive(Debug, Clone, Default)]
pub struct MemoryVolume {
    /// The volume's name, of digits and `-`.
    pub name: String,
    /// The mode of its folder.
    pub mode: u32,
    /// The owner of its folder.
    pub uid: u32,
    /// The group of its folder.
    pub gid: u32,
    /// Bytes that there may be; 0 for the kernel's default.
    pub size: u64,
    /// Files that there may be; 0 for the kernel's default.
    pub files: u64,
    /// The name of the volume whose folder it is; empty for memory of its own.
    pub volume: String,
    /// The path of the folder in that volume.
    pub folder: String,
}

/// Makes the volume, unless it is there.
pub fn make(volume: &MemoryVolume) -> io::Result<()> {
    make_in(Path::new(MEMORY_VOLUMES_PATH), volume)
}

fn make_in(place: &Path, volume: &MemoryVolume) -> io::Result<()> {
    check_name(&volume.name)?;
    let path = place.join(&volume.name);
    fs::create_dir_all(place)?;
    match fs::create_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    let made = match volume.volume.as_str() {
        "" => mount_memory(&path, volume),
        whole => check_name(whole).and_then(|()| mount_folder(&place.join(whole), &path, volume)),
    };
    // Nothing is mounted there, so it is the folder alone that goes.
    made.inspect_err(|_| drop(fs::remove_dir(&path)))
}

fn check_name(name: &str) -> io::Result<()> {
    let plain = |byte: u8| byte.is_ascii_digit() || byte == b'-';
    let fits = !name.is_empty() && name.len() <= 64 && name.bytes().all(plain);
    if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

fn mount_memory(path: &Path, volume: &MemoryVolume) -> io::Result<()> {
    let MemoryVolume { mode, uid, gid, size, files, .. } = volume;
    let mode = mode & 0o7777;
    let mut options = format!("mode={mode:o},uid={uid},gid={gid}");
    if *size != 0 {
        options += &format!(",size={size}");
    }
    if *files != 0 {
        options += &format!(",nr_inodes={files}");
    }
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(())
}

/// Mounts a folder of the memory at `whole`. Containers write there: no link of theirs is followed.
fn mount_folder(whole: &Path, path: &Path, volume: &MemoryVolume) -> io::Result<()> {
    let mut names = Vec::new();
    for component in Path::new(&volume.folder).components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut folder = rustix::fs::openat(CWD, whole, flags, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    for (number, name) in names.iter().enumerate() {
        let last = number + 1 == names.len();
        let mode = if last { volume.mode & 0o7777 } else { 0o755 };
        match mkdirat(&folder, *name, Mode::from_raw_mode(mode)) {
            Err(rustix::io::Errno::EXIST) => {
                folder = openat2(&folder, *name, flags, Mode::empty(), resolve)?;
            }
            made => {
                made?;
                folder = openat2(&folder, *name, flags, Mode::empty(), resolve)?;
                if last {
                    let (uid, gid) = (Uid::from_raw(volume.uid), Gid::from_raw(volume.gid));
                    chownat(&folder, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
                    // The umask, and the change of the owner, have taken bits away.
                    let own = format!("/proc/self/fd/{}", folder.as_raw_fd());
                    rustix::fs::chmod(own, Mode::from_raw_mode(mode))?;
                }
            }
        }
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&folder, c"", flags)?;
    move_mount(&tree, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for name in ["", "..", "a", "1/2", "1\0", &"1".repeat(65)] {
            let volume = MemoryVolume { name: name.to_owned(), ..MemoryVolume::default() };
            let made = make_in(Path::new("/no/such"), &volume);
            assert_eq!(made.unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
        let odd = MemoryVolume {
            name: "1".to_owned(),
            volume: "../x".to_owned(),
            ..MemoryVolume::default()
        };
        let folder = tempfile::tempdir().expect("a folder");
        assert!(make_in(folder.path(), &odd).is_err());
        assert!(!folder.path().join("1").exists());
    }
}
