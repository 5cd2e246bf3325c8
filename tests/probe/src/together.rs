//! Several processes, or threads, at one file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, ensure};

/// Eight writers append to one file: each record is whole, and none is lost.
pub fn append(folder: &str) -> Result<()> {
    const RECORDS: usize = 500;
    let path = Path::new(folder).join("append");
    let _ = fs::remove_file(&path);
    let write = |writer: usize| -> std::io::Result<()> {
        let mut file = File::options().create(true).append(true).open(&path)?;
        for record in 0..RECORDS {
            file.write_all(format!("{writer} {record:04} {}\n", "x".repeat(90)).as_bytes())?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8).map(|n| scope.spawn(move || write(n))).collect();
        writers.into_iter().all(|writer| writer.join().is_ok_and(|done| done.is_ok()))
    })
    .then_some(())
    .ok_or_else(|| anyhow::anyhow!("a writer failed"))?;
    let text = fs::read_to_string(&path)?;
    let mut next = [0; 8];
    for line in text.lines() {
        let mut words = line.split(' ');
        let mut number = || words.next().and_then(|w| w.parse::<usize>().ok());
        let (writer, record) = (number(), number());
        let expected = writer.and_then(|writer| next.get_mut(writer));
        ensure!(line.len() == 97 && expected.as_deref().copied() == record, "{line}");
        expected.into_iter().for_each(|next| *next += 1);
    }
    ensure!(next == [RECORDS; 8], "{next:?}");
    fs::remove_file(&path)?;
    println!("append");
    Ok(())
}

/// `copy_file_range`, `sendfile` and reads past the cache give the same bytes.
pub fn copy(folder: &str) -> Result<()> {
    let base = Path::new(folder);
    let bytes: Vec<u8> =
        (0..1_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(base.join("from"), &bytes)?;
    let from = File::open(base.join("from"))?;
    let check = |name: &str| -> Result<()> {
        ensure!(fs::read(base.join(name))? == bytes, "{name} differs");
        Ok(fs::remove_file(base.join(name))?)
    };
    let (mut read, mut to) = (0, File::create(base.join("ranges"))?);
    while read < bytes.len() as i64 {
        // SAFETY: both files are open, and the offset is ours.
        let count = unsafe {
            let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
            libc::copy_file_range(from, &mut read, to, std::ptr::null_mut(), 300_000, 0)
        };
        ensure!(count > 0, "copy_file_range: {}", std::io::Error::last_os_error());
    }
    check("ranges")?;
    (read, to) = (0, File::create(base.join("sent"))?);
    while read < bytes.len() as i64 {
        // SAFETY: as above.
        let count = unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), &mut read, 300_000) };
        ensure!(count > 0, "sendfile: {}", std::io::Error::last_os_error());
    }
    check("sent")?;
    fs::remove_file(base.join("from"))?;
    println!("copy");
    Ok(())
}

/// Begins to watch a path by inotify.
fn watched(path: &Path, wanted: u32) -> Result<File> {
    // SAFETY: no pointers.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    ensure!(inotify >= 0, "inotify: {}", std::io::Error::last_os_error());
    // SAFETY: inotify_init1 has just made it, and nobody else has it.
    let events = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(inotify) };
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the string ends in NUL.
    let watched = unsafe { libc::inotify_add_watch(inotify, path.as_ptr(), wanted) };
    ensure!(watched >= 0, "watch: {}", std::io::Error::last_os_error());
    Ok(events)
}

/// Reads events, each as its mask in hexadecimal with the name behind.
fn read_events(mut events: &File, seen: &mut Vec<String>) -> Result<()> {
    let mut buffer = vec![0; 4096];
    let count = events.read(&mut buffer)?;
    let mut rest = &buffer[..count];
    // struct inotify_event: descriptor, mask, cookie, length of the name; the name.
    while let Some((head, tail)) = rest.split_at_checked(16) {
        let field =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let length = field(12) as usize;
        ensure!(length <= tail.len(), "a broken event");
        let name = String::from_utf8_lossy(&tail[..length]).replace('\0', "");
        seen.push(format!("{:x}{name}", field(4)));
        rest = &tail[length..];
    }
    Ok(())
}

/// inotify tells of each thing that is done in a folder, in order.
pub fn watch(folder: &str) -> Result<()> {
    let base = Path::new(folder).join("watch");
    fs::create_dir_all(&base)?;
    let wanted = libc::IN_CREATE | libc::IN_CLOSE_WRITE | libc::IN_MOVE | libc::IN_DELETE;
    let events = watched(&base, wanted)?;
    fs::write(base.join("a"), "x")?;
    fs::rename(base.join("a"), base.join("b"))?;
    fs::remove_file(base.join("b"))?;
    let mut seen = Vec::new();
    read_events(&events, &mut seen)?;
    ensure!(seen == ["100a", "8a", "40a", "80b", "200b"], "{seen:?}");
    println!("watch");
    Ok(())
}

/// Tells what others do to `path` until the event `last` comes, repetitions left out, and then what `file`
/// says.
pub fn events(path: &str, last: &str, file: &str) -> Result<()> {
    let changed = libc::IN_MODIFY | libc::IN_CLOSE_WRITE;
    let wanted = changed | libc::IN_CREATE | libc::IN_MOVE | libc::IN_DELETE;
    let before = fs::read_to_string(file)?;
    let events = watched(Path::new(path), wanted)?;
    println!("ready");
    let mut seen = Vec::new();
    while !seen.iter().any(|event| event == last) {
        read_events(&events, &mut seen)?;
    }
    seen.dedup();
    println!("{} {} {}", seen.join(" "), before.trim_end(), fs::read_to_string(file)?.trim_end());
    Ok(())
}
