//! What depends on the file system under a file: content without a size, positions, flags, attributes.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use husk_control::VolumeRules;
use husk_stage::Stage;
use tempfile::{TempDir, tempdir};

use crate::client::{Client, Server, is_root, long, longs, terminated, word, words};

const ROOT: u64 = 1;
const DIRECT_IO: u32 = 1;
const KEEP_CACHE: u32 = 2;
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;
const GET_EXTENDED: u32 = 0x801c_581f;
const SET_EXTENDED: u32 = 0x401c_5820;
const IMMUTABLE: u32 = 0x10;
const APPEND: u32 = 0x20;
const NO_DUMP: u32 = 0x40;

/// A folder as the shim lays it out, whose volume 0 is what is mounted on `.volumes/0`.
fn stage() -> Stage {
    let stage = Stage::apart().unwrap();
    std::fs::create_dir_all(stage.path().join(".volumes/0")).unwrap();
    stage
}

fn serve(stage: &Stage) -> Server {
    let rules = VolumeRules { folder: ".volumes".to_owned(), immutable_flags: true };
    Server::start_with(stage.path(), 1, Some(rules))
}

/// Serves a procfs as volume 0, in the test machine only.
fn serve_procfs() -> Option<(Stage, Server)> {
    if !Path::new("/run/machine").exists() {
        husk_skip::skipped("a procfs is mounted in the test machine only");
        return None;
    }
    let stage = stage();
    stage.mount("proc", ".volumes/0", "").unwrap();
    let server = serve(&stage);
    Some((stage, server))
}

fn walk(client: &mut Client, path: &[&str]) -> Result<u64, i32> {
    path.iter().try_fold(ROOT, |node, name| client.lookup(node, name).map(|entry| entry.node))
}

/// OPEN: the handle and the flags of the answer.
fn open(client: &mut Client, node: u64, flags: i32) -> Result<(u64, u32), i32> {
    let answer = client.call(14, node, &words(&[flags.cast_unsigned(), 0]))?;
    Ok((long(&answer, 0), word(&answer, 8)))
}

/// IOCTL with the data that goes along and the bytes wanted; the data of the answer.
fn ioctl(
    client: &mut Client,
    (node, handle): (u64, u64),
    command: u32,
    data: &[u8],
    room: u32,
) -> Result<Vec<u8>, i32> {
    let mut body = longs(&[handle]);
    body.extend(words(&[0, command]));
    body.extend(longs(&[0]));
    body.extend(words(&[u32::try_from(data.len()).unwrap(), room]));
    body.extend_from_slice(data);
    client.call(39, node, &body).map(|answer| answer[16..].to_vec())
}

fn set_flags(file: &File, flags: u32) -> bool {
    let flags = u64::from(flags);
    // SAFETY: the call reads `flags`.
    unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(SET_FLAGS), &raw const flags) == 0 }
}

#[test]
fn content_without_a_size_is_read_directly() {
    let Some((_stage, mut server)) = serve_procfs() else { return };
    let mut client = server.client();
    let node = walk(&mut client, &[".volumes", "0", "sys", "kernel", "ostype"]).unwrap();
    let (handle, flags) = open(&mut client, node, libc::O_RDONLY).unwrap();
    assert_eq!(flags & (DIRECT_IO | KEEP_CACHE), DIRECT_IO);
    assert_eq!(client.read((node, handle), 0, 4096).unwrap(), b"Linux\n");
}

#[test]
fn the_servers_own_process_is_not_shown() {
    let Some((_stage, mut server)) = serve_procfs() else { return };
    let mut client = server.client();
    let root = walk(&mut client, &[".volumes", "0"]).unwrap();
    let own = std::process::id().to_string();
    let folder = client.lookup(root, &own).unwrap().node;
    for name in
        ["mem", "maps", "environ", "status", "mountinfo", "fd", "root", "task", "oom_score_adj"]
    {
        assert_eq!(client.lookup(folder, name).unwrap_err(), libc::ENOENT, "{name}");
    }
    // Another thread of it has a folder too.
    let thread = std::fs::read_dir("/proc/self/task").unwrap().last().unwrap().unwrap();
    let thread = client.lookup(root, thread.file_name().to_str().unwrap()).unwrap().node;
    assert_eq!(client.lookup(thread, "mem").unwrap_err(), libc::ENOENT);
    // Others are there as they are.
    let first = client.lookup(root, "1").unwrap().node;
    client.lookup(first, "status").unwrap();
}

#[test]
fn positions_fit_32_bits() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for number in 0..300 {
        std::fs::write(folder.path().join(format!("a-file-with-a-number-{number}")), "").unwrap();
    }
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let handle = long(&client.call(27, ROOT, &words(&[0, 0])).unwrap(), 0);
    let mut read = |offset: u64| {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[4096, 0, 0, 0, 0, 0]));
        let bytes = client.call(28, ROOT, &body).unwrap();
        let mut list = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = word(rest, 16) as usize;
            list.push((long(rest, 8), rest[24..24 + length].to_vec()));
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
        list
    };
    let mut all: Vec<(u64, Vec<u8>)> = Vec::new();
    loop {
        let part = read(all.last().map_or(0, |(position, _)| *position));
        if part.is_empty() {
            break;
        }
        all.extend(part);
    }
    assert_eq!(all.len(), 302);
    for (position, _) in &all {
        assert!(i32::try_from(*position).is_ok(), "{position:#x}");
    }
    for index in [250, 3, 100] {
        assert_eq!(read(all[index].0)[0].1, all[index + 1].1);
    }
}

#[test]
fn the_time_of_birth_is_told() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "text").unwrap();
    let Ok(born) = std::fs::metadata(&path).unwrap().created() else {
        return husk_skip::skipped("no time of birth here");
    };
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let node = client.lookup(ROOT, "file").unwrap().node;
    let mut body = words(&[0, 0]);
    body.extend(longs(&[0]));
    body.extend(words(&[0, 0xfff]));
    let answer = client.call(52, node, &body).unwrap();
    assert_eq!(answer.len(), 32 + 256);
    let status = &answer[32..];
    assert_eq!(word(status, 0) & 0xfff, 0xfff, "mask");
    assert_eq!(long(status, 40), 4, "size");
    let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!((long(status, 80), word(status, 88)), (born.as_secs(), born.subsec_nanos()));
}

#[test]
fn inode_flags_are_set_and_the_protecting_ones_on_volumes_only() {
    if !is_root() {
        return;
    }
    let stage = stage();
    for name in ["source", "beside", "container"] {
        std::fs::create_dir(stage.path().join(name)).unwrap();
        std::fs::write(stage.path().join(name).join("file"), "").unwrap();
    }
    let file = File::open(stage.path().join("source/file")).unwrap();
    if !set_flags(&file, APPEND) || !set_flags(&file, 0) {
        return husk_skip::skipped("no append-only files here");
    }
    stage.bind("source", ".volumes/0").unwrap();
    stage.bind("beside", "container").unwrap();
    let mut server = serve(&stage);
    let mut client = server.client();
    let volume = walk(&mut client, &[".volumes", "0", "file"]).unwrap();
    let rootfs = walk(&mut client, &["container", "file"]).unwrap();
    let set = |flags: u32| flags.to_ne_bytes();
    for (node, protecting) in [(volume, Ok(Vec::new())), (rootfs, Err(libc::EPERM))] {
        let (handle, _) = open(&mut client, node, libc::O_RDONLY).unwrap();
        let at = (node, handle);
        ioctl(&mut client, at, SET_FLAGS, &set(NO_DUMP), 0).unwrap();
        let flags = word(&ioctl(&mut client, at, GET_FLAGS, &[], 4).unwrap(), 0);
        assert_eq!(flags & (NO_DUMP | IMMUTABLE), NO_DUMP);
        for flag in [IMMUTABLE, APPEND] {
            assert_eq!(ioctl(&mut client, at, SET_FLAGS, &set(NO_DUMP | flag), 0), protecting);
        }
        let mut extended = ioctl(&mut client, at, GET_EXTENDED, &[], 28).unwrap();
        assert_eq!(extended.len(), 28);
        assert_eq!(word(&extended, 0) & 0x10 != 0, protecting.is_ok(), "FS_XFLAG_APPEND");
        extended[..4].copy_from_slice(&8_u32.to_ne_bytes());
        assert_eq!(ioctl(&mut client, at, SET_EXTENDED, &extended, 0), protecting);
        let _ = ioctl(&mut client, at, SET_FLAGS, &set(0), 0);
        // Other ioctls, and lengths that do not fit.
        assert_eq!(ioctl(&mut client, at, 0x5401, &[], 36), Err(libc::ENOTTY));
        assert_eq!(ioctl(&mut client, at, SET_FLAGS, &[0; 3], 0), Err(libc::ENOTTY));
        assert_eq!(ioctl(&mut client, at, GET_FLAGS, &[], 1 << 20), Err(libc::ENOTTY));
    }
}

#[test]
fn append_only_files_are_appended_to_and_nothing_else() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("log");
    std::fs::write(&path, "one\n").unwrap();
    let file = File::open(&path).unwrap();
    if !set_flags(&file, APPEND) {
        return husk_skip::skipped("no append-only files here");
    }
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let node = client.lookup(ROOT, "log").unwrap().node;
    let plain = open(&mut client, node, libc::O_WRONLY);
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let appending = open(&mut client, node, flags);
    let result = appending.map(|(handle, options)| {
        let at = (node, handle);
        let appended = client.write(at, 0, b"two\n", flags, 0);
        let elsewhere = client.write(at, 0, b"no", libc::O_WRONLY, 0);
        let page = client.write(at, 0, b"no", flags, 1);
        (options & (DIRECT_IO | KEEP_CACHE), appended, elsewhere, page)
    });
    assert!(set_flags(&file, 0));
    assert_eq!(plain, Err(libc::EPERM));
    assert_eq!(result, Ok((DIRECT_IO, Ok(4), Err(libc::EPERM), Err(libc::EPERM))));
    assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
}

#[test]
fn trusted_attributes_are_kept_under_another_name() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let set = |client: &mut Client, name: &str, value: &[u8]| {
        let mut body = words(&[u32::try_from(value.len()).unwrap(), 0]);
        body.extend([terminated(name), value.to_vec()].concat());
        client.call(21, ROOT, &body)
    };
    let get = |client: &mut Client, name: &str| {
        let mut body = words(&[100, 0]);
        body.extend(terminated(name));
        client.call(22, ROOT, &body)
    };
    match set(&mut client, "trusted.overlay.opaque", b"y") {
        Err(libc::EOPNOTSUPP) => return husk_skip::skipped("no user xattrs here"),
        result => result.unwrap(),
    };
    assert_eq!(get(&mut client, "trusted.overlay.opaque").unwrap(), b"y");
    let mapped = "user.husk.trusted.overlay.opaque";
    assert_eq!(get(&mut client, mapped), Err(libc::ENODATA));
    assert_eq!(set(&mut client, mapped, b"n"), Err(libc::EPERM));
    assert_eq!(client.call(24, ROOT, &terminated(mapped)), Err(libc::EPERM));
    let list = |client: &mut Client, room: u32| client.call(23, ROOT, &words(&[room, 0]));
    assert_eq!(list(&mut client, 1000).unwrap(), b"trusted.overlay.opaque\0");
    assert_eq!(word(&list(&mut client, 0).unwrap(), 0), 23);
    assert_eq!(list(&mut client, 22), Err(libc::ERANGE));
    client.uid = 1000;
    assert_eq!(list(&mut client, 1000).unwrap(), b"");
    client.uid = 0;
    client.call(24, ROOT, &terminated("trusted.overlay.opaque")).unwrap();
    assert_eq!(get(&mut client, "trusted.overlay.opaque"), Err(libc::ENODATA));
}

#[test]
fn cached_content_ends_with_a_change_that_hides_its_time() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "one").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    file.set_modified(old).unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let node = client.lookup(ROOT, "file").unwrap().node;
    let kept = |client: &mut Client| {
        let (_, options) = open(client, node, libc::O_RDONLY).unwrap();
        options & KEEP_CACHE != 0
    };
    let settle = || std::thread::sleep(std::time::Duration::from_millis(50));
    settle();
    assert!(!kept(&mut client), "never opened before");
    assert!(kept(&mut client));
    std::fs::write(&path, "two").unwrap();
    file.set_modified(old).unwrap();
    settle();
    assert!(!kept(&mut client), "content, size and time as before");
    assert!(kept(&mut client));
}

#[test]
fn names_and_single_files_of_volumes_are_believed_for_no_time() {
    if !is_root() {
        return;
    }
    let stage = stage();
    std::fs::create_dir(stage.path().join("source")).unwrap();
    for name in ["source/file", ".volumes/1"] {
        std::fs::write(stage.path().join(name), "").unwrap();
    }
    std::fs::create_dir(stage.path().join("container")).unwrap();
    stage.bind("source", ".volumes/0").unwrap();
    stage.bind("source", "container").unwrap();
    stage.bind("source/file", ".volumes/1").unwrap();
    let mut server = serve(&stage);
    let mut client = server.client();
    // LOOKUP: milliseconds for the name, milliseconds for the attributes.
    let answer = |client: &mut Client, path: &[&str], name: &str| {
        let folder = walk(client, path).unwrap();
        let answer = client.call(1, folder, &terminated(name)).unwrap();
        let time = |seconds, nanoseconds| {
            long(&answer, seconds) * 1000 + u64::from(word(&answer, nanoseconds)) / 1_000_000
        };
        (time(16, 32), time(24, 36))
    };
    // As the agent does: GETXATTR.
    let ask = |client: &mut Client| {
        let mut body = words(&[8, 0]);
        body.extend(terminated(husk_control::VALIDITY_ATTRIBUTE));
        client.call(22, ROOT, &body).unwrap();
    };
    let mut times = |path: &[&str], name: &str| answer(&mut client, path, name);
    assert_eq!(times(&["container"], "file"), (0, 0));
    assert_eq!(times(&[".volumes", "0"], "file"), (0, 0));
    ask(&mut client);
    let mut times = |path: &[&str], name: &str| answer(&mut client, path, name);
    assert_eq!(times(&["container"], "file"), (10, 10));
    assert_eq!(times(&["container"], "none").0, 10);
    assert_eq!(times(&[".volumes", "0"], "file"), (0, 10));
    assert_eq!(times(&[".volumes", "0"], "none").0, 0);
    assert_eq!(times(&[".volumes"], "1"), (0, 0));
}
