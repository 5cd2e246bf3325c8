//! Messages made by hand, good and bad.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tempfile::tempdir;

use crate::client::{Client, Server, is_root, long, longs, terminated, word, words};

const ROOT: u64 = 1;
const FILE: u32 = libc::S_IFREG;

fn names(client: &mut Client, node: u64) -> Vec<String> {
    let mut names: Vec<_> = client.list(node).into_iter().map(|(name, _)| name).collect();
    names.sort();
    names
}

#[test]
fn negotiates_what_a_container_needs() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let answer = client.init();
    let flags = word(&answer, 12);
    assert_eq!(word(&answer, 0), 7);
    assert_eq!(word(&answer, 20), 1 << 20, "max_write");
    for (bit, set) in [
        (3, true),   // ATOMIC_O_TRUNC
        (6, true),   // DONT_MASK
        (20, true),  // POSIX_ACL
        (22, true),  // MAX_PAGES
        (27, true),  // SUBMOUNTS
        (28, true),  // HANDLE_KILLPRIV_V2
        (1, false),  // POSIX_LOCKS
        (4, false),  // EXPORT_SUPPORT
        (10, false), // FLOCK_LOCKS
        (16, false), // WRITEBACK_CACHE
    ] {
        assert_eq!(flags >> bit & 1 == 1, set, "bit {bit}");
    }
}

#[test]
fn what_a_user_creates_is_the_users() {
    if !is_root() {
        return;
    }
    let folder = tempdir().unwrap();
    std::fs::create_dir(folder.path().join("team")).unwrap();
    std::os::unix::fs::chown(folder.path().join("team"), Some(0), Some(4242)).unwrap();
    std::fs::set_permissions(folder.path().join("team"), PermissionsExt::from_mode(0o2755))
        .unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    (client.uid, client.gid) = (1000, 2000);
    let (file, _) = client.create(ROOT, "file", libc::O_RDWR, FILE | 0o666, 0o027).unwrap();
    assert_eq!((file.uid, file.gid, file.mode), (1000, 2000, FILE | 0o640));
    let made = client.mkdir(ROOT, "folder", 0o777).unwrap();
    assert_eq!((made.uid, made.gid, made.mode & 0o7777), (1000, 2000, 0o777));
    let team = client.lookup(ROOT, "team").unwrap();
    let (file, _) = client.create(team.node, "file", libc::O_RDWR, FILE | 0o600, 0).unwrap();
    assert_eq!((file.uid, file.gid), (1000, 4242), "the group of a set-group-id folder");
    let made = client.mkdir(team.node, "folder", 0o755).unwrap();
    assert_eq!((made.gid, made.mode & 0o7777), (4242, 0o2755));
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    assert_eq!((fifo.uid, fifo.mode), (1000, libc::S_IFIFO | 0o600));
    let white = client.mknod(ROOT, "whiteout", libc::S_IFCHR, 0).unwrap();
    assert_eq!(white.mode & libc::S_IFMT, libc::S_IFCHR);
    let metadata = std::fs::metadata(folder.path().join("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode()), (1000, 2000, FILE | 0o640));
    // The thread is root again.
    (client.uid, client.gid) = (0, 0);
    let (file, _) = client.create(ROOT, "roots", libc::O_RDWR, FILE | 0o600, 0).unwrap();
    assert_eq!((file.uid, file.gid), (0, 0));
}

#[test]
fn content_goes_both_ways() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let (file, handle) =
        client.create(ROOT, "file", libc::O_RDWR | libc::O_APPEND, FILE | 0o644, 0).unwrap();
    let at = (file.node, handle);
    let large: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_ne_bytes).collect();
    assert_eq!(client.write(at, 0, &large, libc::O_RDWR, 0), Ok(1 << 20));
    assert_eq!(client.read(at, 0, 1 << 20).unwrap(), large);
    // More than is there, and more than any answer has room for.
    assert_eq!(client.read(at, (1 << 20) - 3, 100).unwrap().len(), 3);
    assert_eq!(client.read(at, 0, u32::MAX).unwrap()[..1 << 20], large);
    // Appended wherever the end is; from the guest's cache to where it belongs.
    client.write(at, 0, b"end", libc::O_RDWR | libc::O_APPEND, 0).unwrap();
    client.write(at, 0, b"new", libc::O_RDWR | libc::O_APPEND, 1).unwrap();
    let content = std::fs::read(folder.path().join("file")).unwrap();
    assert!(content.starts_with(b"new") && content.ends_with(b"end"));
    assert_eq!(content.len(), (1 << 20) + 3);
    // The buffers are given back after a while of silence, and come again.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(client.read(at, 4, 1 << 20).unwrap()[..], content[4..]);
    assert_eq!(client.read((file.node, 77), 0, 1), Err(libc::EBADF));
}

#[test]
fn changing_a_file_takes_its_set_user_id_away() {
    if !is_root() {
        return;
    }
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let (file, handle) = client.create(ROOT, "file", libc::O_RDWR, FILE | 0o755, 0).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755)).unwrap();
    client.write((file.node, handle), 0, b"x", libc::O_RDWR, 0).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o6755, "not asked for");
    client.write((file.node, handle), 0, b"x", libc::O_RDWR, 4).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o755, "asked for");
    // Only for that one request.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755)).unwrap();
    client.write((file.node, handle), 0, b"x", libc::O_RDWR, 0).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o6755);
}

#[test]
fn no_name_leads_out() {
    let outer = tempdir().unwrap();
    let folder = outer.path().join("folder");
    std::fs::create_dir_all(folder.join("inner")).unwrap();
    std::fs::write(outer.path().join("secret"), "").unwrap();
    symlink(outer.path(), folder.join("link")).unwrap();
    let mut server = Server::start(&folder, 1);
    let mut client = server.client();
    let inner = client.lookup(ROOT, "inner").unwrap().node;
    for parent in [ROOT, inner] {
        for name in ["..", ".", "", "../secret", "inner/..", "/etc"] {
            assert_eq!(client.lookup(parent, name), Err(libc::EINVAL), "{name:?}");
            assert_eq!(client.mkdir(parent, name, 0o755), Err(libc::EINVAL), "{name:?}");
            let created = client.create(parent, name, libc::O_RDWR, FILE | 0o600, 0);
            assert_eq!(created, Err(libc::EINVAL), "{name:?}");
            let mut body = longs(&[ROOT]);
            body.extend([terminated(name), terminated("x")].concat());
            assert_eq!(client.call(12, parent, &body), Err(libc::EINVAL), "{name:?}");
            let mut body = longs(&[ROOT]);
            body.extend([terminated("inner"), terminated(name)].concat());
            assert_eq!(client.call(12, parent, &body), Err(libc::EINVAL), "{name:?}");
        }
    }
    // A link is itself, never what it points to.
    let link = client.lookup(ROOT, "link").unwrap();
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    let through = client.lookup(link.node, "secret");
    assert_eq!(through, Err(libc::ENOTDIR));
    assert_eq!(client.open(link.node, libc::O_RDONLY), Err(libc::ENXIO));
    let opened = client.call(27, link.node, &words(&[0, 0]));
    assert_eq!(opened, Err(libc::ENXIO));
    let created = client.create(ROOT, "link", libc::O_RDWR | libc::O_TRUNC, FILE | 0o600, 0);
    assert_eq!(created.unwrap_err(), libc::ENXIO);
    assert_eq!(client.lookup(99, "x"), Err(libc::ESTALE));
}

#[test]
fn devices_and_fifos_are_never_opened() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    let mut made = vec![("fifo", fifo)];
    if is_root() {
        // As mknod(2) packs 1:3, /dev/null.
        let device = client.mknod(ROOT, "null", libc::S_IFCHR | 0o666, 0x103).unwrap();
        let metadata = std::fs::metadata(folder.path().join("null")).unwrap();
        assert!(metadata.file_type().is_char_device());
        assert_eq!(metadata.rdev(), libc::makedev(1, 3));
        made.push(("null", device));
    }
    for (name, entry) in made {
        for flags in [libc::O_RDONLY, libc::O_WRONLY | libc::O_TRUNC] {
            assert_eq!(client.open(entry.node, flags), Err(libc::ENXIO));
            let created = client.create(ROOT, name, flags, FILE | 0o600, 0);
            assert_eq!(created.unwrap_err(), libc::ENXIO);
        }
    }
}

#[test]
fn malformed_messages_are_refused_and_do_no_harm() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 3);
    let mut client = server.client();
    assert_eq!(client.call(1, ROOT, b"no end"), Err(libc::EINVAL));
    assert_eq!(client.call(1, ROOT, b""), Err(libc::EINVAL));
    assert_eq!(client.call(6, ROOT, b"one\0"), Err(libc::EINVAL));
    assert_eq!(client.call(4, ROOT, &[0; 87]), Err(libc::EINVAL));
    assert_eq!(client.call(47, ROOT, &[0; 55]), Err(libc::EINVAL));
    assert_eq!(client.call(21, ROOT, &[0xff; 100]), Err(libc::EINVAL));
    // INIT with FUSE_INIT_EXT, and nothing of what that says.
    assert_eq!(client.call(26, 0, &words(&[7, 36, 0, 1 << 30])), Err(libc::EINVAL));
    assert_eq!(client.call(4000, ROOT, &[]), Err(libc::ENOSYS));
    let mut body = words(&[u32::MAX, 0]);
    body.extend(terminated("user.x"));
    assert_eq!(client.call(21, ROOT, &body), Err(libc::EINVAL));
    // Without answers: a forget of nothing, of too much, of the root, and an interrupt.
    client.send(2, 99, &longs(&[1]));
    client.send(2, ROOT, &longs(&[u64::MAX]));
    client.send(42, ROOT, &words(&[u32::MAX, 0]));
    client.send(42, ROOT, &[]);
    client.send(36, ROOT, &longs(&[2]));
    assert_eq!(client.lookup(ROOT, "nothing").unwrap().node, 0);
    // A message that cannot be framed closes its channel, not the others.
    for length in [0, 39, (1 << 20) + 4097, u32::MAX] {
        if server.channels.is_empty() {
            break;
        }
        let mut stream = server.channels.remove(0);
        let mut header = vec![0; 40];
        header[..4].copy_from_slice(&length.to_ne_bytes());
        stream.write_all(&header).unwrap();
        assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    }
    client.lookup(ROOT, "nothing").unwrap();
}

#[test]
fn messages_in_pieces_and_in_a_row_are_understood() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let node = client.lookup(ROOT, "file").unwrap().node;
    let mut bytes = Vec::new();
    for (opcode, to, body) in
        [(2_u32, node, longs(&[0])), (36, 1, longs(&[2])), (1, 1, terminated("file"))]
    {
        bytes.extend(words(&[u32::try_from(40 + body.len()).unwrap(), opcode]));
        bytes.extend(longs(&[1000, to]));
        bytes.extend(words(&[0, 0, 0, 0]));
        bytes.extend(body);
    }
    for piece in bytes.chunks(7) {
        client.stream.write_all(piece).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let (unique, result) = client.receive();
    assert_eq!(unique, 1000);
    assert_eq!(long(&result.unwrap(), 0), node);
}

#[test]
fn a_large_folder_is_listed_whole_and_forgotten_whole() {
    let folder = tempdir().unwrap();
    let many = 3000;
    for number in 0..many {
        std::fs::write(folder.path().join(format!("file-{number:05}")), "").unwrap();
    }
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let list = client.list(ROOT);
    let mut names: Vec<_> = list.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), many + 2);
    assert_eq!(names[..2], [".", ".."]);
    for (name, entry) in &list {
        assert_eq!(entry.node == 0, name.starts_with('.'), "{name}");
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let held = open();
    assert!(held >= many);
    let mut body = words(&[u32::try_from(many).unwrap(), 0]);
    for (_, entry) in list.iter().filter(|(_, entry)| entry.node != 0) {
        body.extend(longs(&[entry.node, 1]));
    }
    client.send(42, ROOT, &body);
    let node = list.iter().find(|(_, entry)| entry.node != 0).unwrap().1.node;
    assert_eq!(client.call(3, node, &[0; 16]), Err(libc::ESTALE));
    assert!(open() < held - many / 2);
}

#[test]
fn renames_links_and_removes() {
    let folder = tempdir().unwrap();
    let here = |name: &str| folder.path().join(name);
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let a = client.create(ROOT, "a", libc::O_RDWR, FILE | 0o644, 0).unwrap().0;
    let b = client.create(ROOT, "b", libc::O_RDWR, FILE | 0o644, 0).unwrap().0;
    let mut rename = |old: &str, new: &str, flags: u32| {
        let mut body = longs(&[ROOT]);
        body.extend(words(&[flags, 0]));
        body.extend([terminated(old), terminated(new)].concat());
        client.call(45, ROOT, &body)
    };
    assert_eq!(rename("a", "b", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    rename("a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(client.lookup(ROOT, "b").unwrap().node, a.node);
    assert_eq!(client.lookup(ROOT, "a").unwrap().node, b.node);
    let mut link = |node: u64, name: &str| {
        let mut body = longs(&[node]);
        body.extend(terminated(name));
        client.call(13, ROOT, &body)
    };
    link(a.node, "c").unwrap();
    assert_eq!(std::fs::metadata(here("c")).unwrap().nlink(), 2);
    let target = "t".repeat(4000);
    client.call(6, ROOT, &[terminated("link"), terminated(&target)].concat()).unwrap();
    let node = client.lookup(ROOT, "link").unwrap().node;
    assert_eq!(client.call(5, node, &[]).unwrap(), target.as_bytes());
    // A hard link to a symbolic link, as ln(1) can make it.
    let mut body = longs(&[node]);
    body.extend(terminated("link-2"));
    client.call(13, ROOT, &body).unwrap();
    assert_eq!(std::fs::read_link(here("link-2")).unwrap(), Path::new(&target));
    for name in ["a", "b", "c", "link", "link-2"] {
        client.call(10, ROOT, &terminated(name)).unwrap();
    }
    assert_eq!(client.call(10, ROOT, &terminated("a")), Err(libc::ENOENT));
    assert_eq!(names(&mut client, ROOT), [".", ".."]);
}

#[test]
fn extended_attributes_and_temporary_files() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let mut body = words(&[(libc::O_RDWR | libc::O_TMPFILE).cast_unsigned(), FILE | 0o640, 0, 0]);
    body.extend(terminated("#1"));
    let answer = match client.call(51, ROOT, &body) {
        Err(libc::EOPNOTSUPP) => return husk_skip::skipped("no O_TMPFILE here"),
        answer => answer.unwrap(),
    };
    let (node, handle) = (long(&answer, 0), long(&answer, 128));
    assert_eq!(names(&mut client, ROOT), [".", ".."]);
    client.write((node, handle), 0, b"nameless", libc::O_RDWR, 0).unwrap();
    let mut body = longs(&[node]);
    body.extend(terminated("named"));
    client.call(13, ROOT, &body).unwrap();
    assert_eq!(std::fs::read(folder.path().join("named")).unwrap(), b"nameless");
    let set = |client: &mut Client, name: &str, value: &[u8]| {
        let mut body = words(&[u32::try_from(value.len()).unwrap(), 0]);
        body.extend([terminated(name), value.to_vec()].concat());
        client.call(21, node, &body)
    };
    match set(&mut client, "user.colour", b"red") {
        Err(libc::EOPNOTSUPP) => return husk_skip::skipped("no user xattrs here"),
        result => result.unwrap(),
    };
    let mut get = words(&[0, 0]);
    get.extend(terminated("user.colour"));
    assert_eq!(word(&client.call(22, node, &get).unwrap(), 0), 3);
    get[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(client.call(22, node, &get).unwrap(), b"red");
    get[..4].copy_from_slice(&2_u32.to_ne_bytes());
    assert_eq!(client.call(22, node, &get), Err(libc::ERANGE));
    let listed = client.call(23, node, &words(&[1000, 0])).unwrap();
    assert!(listed.windows(12).any(|name| name == b"user.colour\0"));
    client.call(24, node, &terminated("user.colour")).unwrap();
    assert_eq!(client.call(24, node, &terminated("user.colour")), Err(libc::ENODATA));
    if is_root() {
        // cap_net_raw=ep, version 2.
        let value = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set(&mut client, "security.capability", &value).unwrap();
    }
}

#[test]
fn holes_ranges_and_space() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let (from, from_handle) = client.create(ROOT, "a", libc::O_RDWR, FILE | 0o644, 0).unwrap();
    let (to, to_handle) = client.create(ROOT, "b", libc::O_RDWR, FILE | 0o644, 0).unwrap();
    let at = (from.node, from_handle);
    client.write(at, 1 << 20, b"data", libc::O_RDWR, 0).unwrap();
    let mut seek = |offset: u64, whence: i32| {
        let mut body = longs(&[from_handle, offset]);
        body.extend(words(&[whence.cast_unsigned(), 0]));
        client.call(46, from.node, &body)
    };
    assert_eq!(long(&seek(0, libc::SEEK_DATA).unwrap(), 0), 1 << 20);
    assert_eq!(seek(0, libc::SEEK_SET), Err(libc::EINVAL));
    let mut copy = longs(&[from_handle, 1 << 20, to.node, to_handle, 1, 4, 0]);
    let copied = client.call(47, from.node, &copy);
    if copied != Err(libc::EXDEV) && copied != Err(libc::EOPNOTSUPP) {
        assert_eq!(word(&copied.unwrap(), 0), 4);
        assert_eq!(client.read((to.node, to_handle), 0, 10).unwrap(), b"\0data");
    }
    copy[..8].copy_from_slice(&999_u64.to_ne_bytes());
    assert_eq!(client.call(47, from.node, &copy), Err(libc::EBADF));
    let mut fallocate = |mode: i32, offset: u64, length: u64| {
        let mut body = longs(&[from_handle, offset, length]);
        body.extend(words(&[mode.cast_unsigned(), 0]));
        client.call(43, from.node, &body)
    };
    fallocate(0, 0, 4 << 20).unwrap();
    fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 1 << 20, 4096).unwrap();
    assert_eq!(fallocate(0, u64::MAX, 1), Err(libc::EINVAL));
    let content = std::fs::read(folder.path().join("a")).unwrap();
    assert_eq!((content.len(), content[1 << 20]), (4 << 20, 0));
    client.call(50, ROOT, &longs(&[0])).unwrap();
    assert_eq!(client.call(17, ROOT, &[]).unwrap().len(), 80);
}

#[test]
fn attributes_change_as_asked() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("file");
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let (file, handle) = client.create(ROOT, "file", libc::O_RDWR, FILE | 0o644, 0).unwrap();
    // struct fuse_setattr_in: valid, fh, size, lock owner, three times, three nanoseconds, mode, ids.
    let mut set = |valid: u32, size: u64, mode: u32, owner: u32| {
        let mut body = words(&[valid, 0]);
        body.extend(longs(&[handle, size, 0, 11, 22, 0]));
        body.extend(words(&[111, 222, 0, mode, 0, owner, owner, 0]));
        client.call(4, file.node, &body)
    };
    set(1 << 0, 0, 0o4711, 0).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o4711);
    set(1 << 3, 5000, 0, 0).unwrap();
    set(1 << 3 | 1 << 6, 6000, 0, 0).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 6000);
    assert_eq!(set(1 << 3, u64::MAX, 0, 0), Err(libc::EINVAL));
    set(1 << 4 | 1 << 5, 0, 0, 0).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.atime(), metadata.mtime()), (11, 22));
    assert_eq!((metadata.atime_nsec(), metadata.mtime_nsec()), (111, 222));
    if is_root() {
        set(1 << 1 | 1 << 2, 0, 0, 77).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (77, 77, 0o711));
    }
}

#[test]
fn messages_of_the_connection_itself_keep_the_channel_in_step() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let file = client.create(ROOT, "file", libc::O_RDWR, FILE | 0o600, 0).unwrap().0;
    // NOTIFY_REPLY, INTERRUPT: nothing comes back, so the next answer is the next request's.
    client.send(41, ROOT, &[0; 40]);
    client.send(36, ROOT, &longs(&[1]));
    assert_eq!(client.lookup(ROOT, "file").unwrap().node, file.node);
    // DESTROY, at the end of a mount.
    client.call(38, 0, &[]).unwrap();
    assert_eq!(client.call(3, file.node, &[0; 16]), Err(libc::ESTALE), "nothing is held any more");
    client.init();
    client.lookup(ROOT, "file").unwrap();
}

#[test]
fn only_one_folder_is_served() {
    let folder = tempdir().unwrap();
    let mut server = Server::start(folder.path(), 1);
    let control = server.control.take().unwrap();
    let request = husk_control::FilesRequest::Serve(husk_control::FilesConfig {
        folder: 0,
        channels: vec![1],
        vhost_user: None,
        volumes: None,
    });
    husk_control::send(&control, &request, &[]).unwrap();
    let answer = husk_control::receive::<husk_control::FilesMessage>(&control).unwrap().unwrap();
    assert!(matches!(answer.message, husk_control::FilesMessage::Failed { .. }));
    server.thread.take().unwrap().join().unwrap().unwrap_err();
    server.thread = Some(std::thread::spawn(|| Ok(())));
}
