//! What the file system under a volume judges or keeps itself.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::attributes::Attributes;

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`, whose numbers speak of a `long` and that mean an `int`.
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;
const APPEND: libc::c_int = 0x20;

const GROUP: u32 = 2000;

/// A user who is of the folder's group only by a supplementary one: of mode 2770, with a file of mode 0640.
pub fn groups(folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let closed = folder.join("closed");
    setgroups(&[Gid::from_raw(GROUP)])?;
    let (user, group) = (Uid::from_raw(1000), Gid::from_raw(1000));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    ensure!(fs::read_to_string(folder.join("read"))? == "for the group\n", "read");
    refused(OpenOptions::new().write(true).open(folder.join("read")), Errno::EACCES)?;
    refused(File::open(&closed), Errno::EACCES)?;
    refused(fs::set_permissions(&closed, Permissions::from_mode(0o666)), Errno::EPERM)?;
    ensure!(fs::read_dir(folder)?.count() == 2, "list");
    let new = folder.join("new");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o660).open(&new)?;
    file.write_all(b"by a user")?;
    let meta = file.metadata()?;
    ensure!((meta.uid(), meta.gid()) == (1000, GROUP), "owner {} {}", meta.uid(), meta.gid());
    fs::rename(&new, folder.join("moved"))?;
    fs::create_dir(folder.join("inner"))?;
    let meta = fs::metadata(folder.join("inner"))?;
    ensure!(meta.gid() == GROUP && meta.mode() & 0o2000 != 0, "folder {:o}", meta.mode());
    fs::write(folder.join("inner/file"), "")?;
    fs::remove_file(&closed)?;
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(folder.join("moved"))?
        .write_all(b"again")?;
    println!("groups");
    Ok(())
}

fn refused<T>(done: std::io::Result<T>, wanted: Errno) -> Result<()> {
    let error = done.err().with_context(|| format!("{wanted} was expected"))?;
    ensure!(error.raw_os_error() == Some(wanted as i32), "{error} instead of {wanted}");
    Ok(())
}

fn set_append(file: &File, on: bool) -> Result<()> {
    let mut flags: libc::c_int = 0;
    // SAFETY: the call writes a number to `flags`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), GET_FLAGS.into(), &raw mut flags) })?;
    flags = if on { flags | APPEND } else { flags & !APPEND };
    // SAFETY: the call reads a number from `flags`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), SET_FLAGS.into(), &raw const flags) })?;
    Ok(())
}

/// An append-only file is appended to, and nothing else.
pub fn append_only(folder: &str) -> Result<()> {
    let path = Path::new(folder).join("append-only");
    fs::write(&path, "one\n")?;
    let file = File::open(&path)?;
    set_append(&file, true)?;
    let tried = try_append_only(&path);
    set_append(&file, false)?;
    tried?;
    ensure!(fs::read_to_string(&path)? == "one\ntwo\nthree\n", "{:?}", fs::read_to_string(&path));
    fs::remove_file(&path)?;
    println!("append-only");
    Ok(())
}

fn try_append_only(path: &Path) -> Result<()> {
    refused(OpenOptions::new().write(true).open(path), Errno::EPERM)?;
    refused(OpenOptions::new().append(true).custom_flags(libc::O_TRUNC).open(path), Errno::EPERM)?;
    refused(fs::remove_file(path), Errno::EPERM)?;
    refused(fs::rename(path, path.with_extension("moved")), Errno::EPERM)?;
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(b"two\n")?;
    // Linux appends whatever the position says.
    file.write_all_at(b"three\n", 0)?;
    refused(file.set_len(1), Errno::EPERM)
}

/// Prints when a file was born.
pub fn birth(path: &str) -> Result<()> {
    let born = fs::metadata(path)?.created()?.duration_since(UNIX_EPOCH)?;
    println!("{}.{:09}", born.as_secs(), born.subsec_nanos());
    Ok(())
}

/// `trusted` attributes of a file and of a folder.
pub fn trusted(folder: &str) -> Result<()> {
    let path = Path::new(folder).join("trusted");
    fs::write(&path, "")?;
    for path in [path.as_path(), Path::new(folder)] {
        let file = Attributes::of(path)?;
        ensure!(file.set(c"trusted.overlay.opaque", b"y", 0).is_none(), "set");
        ensure!(file.get(c"trusted.overlay.opaque", 10) == Ok(b"y".to_vec()), "get");
        ensure!(file.names()?.contains(&"trusted.overlay.opaque".to_owned()), "{:?}", file.names());
        ensure!(file.remove(c"trusted.overlay.opaque").is_none(), "remove");
        ensure!(file.get(c"trusted.overlay.opaque", 10) == Err(libc::ENODATA), "removed");
    }
    println!("trusted");
    Ok(())
}
