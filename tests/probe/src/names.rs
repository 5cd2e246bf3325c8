//! Folders, and the names in them.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::fd::IntoRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Names of every kind that a file may have, and those that it may not.
pub fn odd(folder: &str) -> Result<()> {
    let base = Path::new(folder).join("odd");
    fs::create_dir_all(&base)?;
    let longest = "n".repeat(255);
    let names: [&[u8]; 9] = [
        b" spaces and\ttabs ",
        b"line\nbreak",
        "snow☃man".as_bytes(),
        b"not \xff\xfe text",
        b"-rf",
        b"...",
        b"~",
        b"\x01\x7f*?[\\",
        longest.as_bytes(),
    ];
    for name in names {
        fs::write(base.join(OsStr::from_bytes(name)), name).with_context(|| format!("{name:?}"))?;
    }
    let listed: BTreeSet<_> =
        fs::read_dir(&base)?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?;
    let wanted: BTreeSet<_> = names.iter().map(|name| OsStr::from_bytes(name).into()).collect();
    ensure!(listed == wanted, "{listed:?}");
    for name in names {
        ensure!(fs::read(base.join(OsStr::from_bytes(name)))? == name, "{name:?}");
    }
    let refused = |result: std::io::Result<()>| result.err().and_then(|e| e.raw_os_error());
    let too_long = refused(fs::write(base.join("n".repeat(256)), ""));
    ensure!(too_long == Some(libc::ENAMETOOLONG), "256 letters: {too_long:?}");
    ensure!(refused(fs::remove_dir(&base)) == Some(libc::ENOTEMPTY), "a full folder went");
    // As deep as a path may be long, one step after the other.
    let mut deep = base.join("deep");
    for _ in 0..100 {
        deep = deep.join("a-folder-in-it");
    }
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("end"), "found")?;
    ensure!(fs::read_to_string(deep.join("end"))? == "found");
    fs::remove_dir_all(&base)?;
    println!("odd-names");
    Ok(())
}

/// A listing that is interrupted, set back and continued misses nothing and tells nothing twice,
/// while names are removed under it.
pub fn seek(folder: &str) -> Result<()> {
    let base = Path::new(folder).join("seek");
    fs::create_dir_all(&base)?;
    for number in 0..2000 {
        File::create(base.join(format!("a-name-that-takes-its-room-{number:04}")))?;
    }
    let descriptor = File::open(&base)?.into_raw_fd();
    // SAFETY: an open folder, whose descriptor the stream takes over; it is closed below.
    let stream = unsafe { libc::fdopendir(descriptor) };
    ensure!(!stream.is_null(), "fdopendir: {}", std::io::Error::last_os_error());
    let next = || {
        // SAFETY: the stream is open; the entry is copied before the next call.
        let entry = unsafe { libc::readdir(stream).as_ref() }?;
        // SAFETY: the kernel ends each name by NUL.
        let name = unsafe { std::ffi::CStr::from_ptr(entry.d_name.as_ptr()) };
        Some(name.to_string_lossy().into_owned())
    };
    let mut first = Vec::new();
    for _ in 0..700 {
        first.push(next().context("it ends early")?);
    }
    // SAFETY: as above.
    let place = unsafe { libc::telldir(stream) };
    let rest: Vec<_> = std::iter::from_fn(next).collect();
    // SAFETY: as above; the place is one the stream has told.
    unsafe { libc::seekdir(stream, place) };
    let again: Vec<_> = std::iter::from_fn(next).collect();
    ensure!(rest == again, "{} names, then {}", rest.len(), again.len());
    let all: BTreeSet<_> = first.iter().chain(&rest).collect();
    ensure!(all.len() == first.len() + rest.len(), "a name came twice");
    ensure!(all.len() == 2002, "{} names", all.len());
    // SAFETY: as above.
    unsafe { libc::rewinddir(stream) };
    let mut removed = 0;
    while let Some(name) = next() {
        if !name.starts_with('.') {
            fs::remove_file(base.join(name))?;
            removed += 1;
        }
    }
    // SAFETY: nobody uses the stream after this.
    unsafe { libc::closedir(stream) };
    ensure!(removed == 2000, "{removed} were listed while they were removed");
    fs::remove_dir(&base)?;
    println!("seek");
    Ok(())
}

/// `O_TMPFILE`: a file without a name, which gets one later.
pub fn temporary(folder: &str) -> Result<()> {
    let base = CString::new(folder)?;
    // SAFETY: the string ends in NUL.
    let open = unsafe {
        libc::open(base.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, 0o640)
    };
    ensure!(open >= 0, "O_TMPFILE: {}", std::io::Error::last_os_error());
    // SAFETY: open has just made it, and nobody else has it.
    let mut file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(open) };
    std::io::Write::write_all(&mut file, b"now it has one")?;
    ensure!(std::os::unix::fs::MetadataExt::nlink(&file.metadata()?) == 0);
    let path = Path::new(folder).join("named");
    let (from, to) = (CString::new(format!("/proc/self/fd/{open}"))?, path.as_os_str().as_bytes());
    let to = CString::new(to)?;
    // SAFETY: both strings end in NUL.
    let linked = unsafe {
        let here = libc::AT_FDCWD;
        libc::linkat(here, from.as_ptr(), here, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    ensure!(linked == 0, "linkat: {}", std::io::Error::last_os_error());
    ensure!(fs::read_to_string(&path)? == "now it has one");
    fs::remove_file(&path)?;
    println!("temporary");
    Ok(())
}
