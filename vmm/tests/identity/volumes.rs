//! Volumes of one device: one file system to the guest, and a file that several of them have is one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use husk_stage::Stage;

use crate::client::{Client, Entry, is_root, long, longs, terminated};
use crate::serve;

const ROOT: u64 = 1;
const SUBMOUNT: u32 = 1;

/// A share with five volumes in the group `g`: 0 is the folder `disk/top`, 1 is its subfolder, 2 is a file of
/// that, 3 is the top again, read-only, and 4 is of another device.
fn stage(kind: &str) -> Option<Stage> {
    let stage = Stage::apart().unwrap();
    stage.mount("tmpfs", "", "").unwrap();
    let at = |name: &str| stage.path().join(name);
    for name in ["disk", "other", ".volumes/g/0", ".volumes/g/1", ".volumes/g/3", ".volumes/g/4"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::write(at(".volumes/g/2"), "").unwrap();
    if !fill(&stage, kind) {
        husk_skip::skipped(format!("cannot mount {kind}"));
        return None;
    }
    fs::create_dir_all(at("disk/top/sub/inner")).unwrap();
    fs::write(at("disk/top/sub/file"), "text").unwrap();
    for (source, volume) in [
        ("disk/top", ".volumes/g/0"),
        ("disk/top/sub", ".volumes/g/1"),
        ("disk/top/sub/file", ".volumes/g/2"),
        ("disk/top", ".volumes/g/3"),
    ] {
        stage.bind(source, volume).unwrap();
    }
    stage.make_read_only(".volumes/g/3").unwrap();
    stage.mount("tmpfs", ".volumes/g/4", "").unwrap();
    Some(stage)
}

/// Mounts a file system on `disk`.
fn fill(stage: &Stage, kind: &str) -> bool {
    let disk = stage.path().join("disk");
    match kind {
        "ext4" => {
            let image = stage.path().join("image");
            fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
            let run = |command: &mut Command| command.status().is_ok_and(|status| status.success());
            run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))
                && run(Command::new("mount").args(["-o", "loop"]).args([&image, &disk]))
        }
        "overlay" => {
            let at = |name: &str| stage.path().join("other").join(name);
            for name in ["lower/top/sub", "upper", "work"] {
                fs::create_dir_all(at(name)).unwrap();
            }
            fs::write(at("lower/top/sub/lower"), "lower").unwrap();
            let [lower, upper, work] =
                ["lower", "upper", "work"].map(|name| at(name).display().to_string());
            let data = format!("lowerdir={lower},upperdir={upper},workdir={work}");
            stage.mount("overlay", "disk", &data).unwrap();
            true
        }
        kind => {
            stage.mount(kind, "disk", "").unwrap();
            true
        }
    }
}

fn walk(client: &mut Client, path: &str) -> Result<Entry, i32> {
    let mut names = path.split('/').peekable();
    let mut node = client.lookup(ROOT, ".volumes")?.node;
    node = client.lookup(node, "g")?.node;
    loop {
        let entry = client.lookup(node, names.next().unwrap())?;
        if names.peek().is_none() {
            return Ok(entry);
        }
        node = entry.node;
    }
}

/// SETATTR of the size or the mode.
fn set(client: &mut Client, node: u64, valid: u32, value: u32) -> Result<(), i32> {
    let mut body = vec![0; 88];
    body[..4].copy_from_slice(&valid.to_ne_bytes());
    body[16..20].copy_from_slice(&value.to_ne_bytes());
    body[68..72].copy_from_slice(&value.to_ne_bytes());
    client.call(4, node, &body).map(drop)
}

const SIZE: u32 = 8;
const MODE: u32 = 1;

fn attributes(client: &mut Client, node: u64) -> Result<Entry, i32> {
    client.call(3, node, &[0; 16]).map(|bytes| {
        let mut entry = vec![0; 40];
        entry.extend_from_slice(&bytes[16..]);
        Entry { node, ..Entry::read(&entry) }
    })
}

fn on_each(body: impl Fn(&Stage, &mut Client, &str)) {
    if !is_root() {
        return;
    }
    for kind in ["tmpfs", "ext4", "overlay"] {
        let Some(stage) = stage(kind) else { continue };
        let mut client = serve(stage.path());
        body(&stage, &mut client, kind);
    }
}

#[test]
fn a_file_that_two_volumes_have_is_one_and_their_folders_are_two() {
    on_each(|stage, client, kind| {
        let volumes = client.lookup(ROOT, ".volumes").unwrap();
        let group = client.lookup(volumes.node, "g").unwrap();
        assert_eq!((volumes.flags, group.flags), (0, SUBMOUNT));
        let entries = ["0", "1", "2", "3", "4"].map(|name| walk(client, name).unwrap());
        assert_eq!(entries.map(|entry| entry.flags), [0, 0, 0, 0, SUBMOUNT], "{kind}");
        let sub = walk(client, "0/sub").unwrap();
        assert_ne!(sub.node, entries[1].node);
        assert_eq!(sub.inode, entries[1].inode);
        assert_ne!(entries[0].node, entries[3].node);
        let host = fs::metadata(stage.path().join("disk/top/sub/file")).unwrap();
        for name in ["0/sub/file", "1/file", "2", "3/sub/file"] {
            let entry = walk(client, name).unwrap();
            assert_eq!((entry.node, entry.inode), (entries[2].node, host.ino()), "{kind} {name}");
        }
        // What is made by one is there by the other.
        for (name, mode) in [("fifo", libc::S_IFIFO), ("socket", libc::S_IFSOCK)] {
            let made = client.mknod(sub.node, name, mode | 0o600, 0).unwrap();
            assert_eq!(walk(client, &format!("1/{name}")).unwrap().node, made.node);
            assert_eq!(walk(client, &format!("3/sub/{name}")).unwrap().node, made.node);
        }
        let (made, _) = client.create(entries[1].node, "new", libc::O_RDWR, 0o600, 0).unwrap();
        assert_eq!(walk(client, "0/sub/new").unwrap().node, made.node);
        // A further name is on the mount where it is made, wherever the file was found first.
        for (folder, name) in [(sub.node, "by-top"), (entries[1].node, "by-sub")] {
            let body = [longs(&[made.node]), terminated(name)].concat();
            let linked = long(&client.call(13, folder, &body).unwrap(), 0);
            assert_eq!(linked, made.node, "{kind}");
            assert_eq!(walk(client, &format!("0/sub/{name}")).unwrap().node, made.node);
        }
        assert_eq!(attributes(client, made.node).unwrap().inode, made.inode);
        // The whole group, and each volume, can be written out.
        for node in [group.node, entries[0].node, entries[4].node] {
            client.call(50, node, &longs(&[0])).unwrap();
        }
    });
}

#[test]
fn what_a_writable_volume_allows_is_done_though_a_read_only_one_had_it_first() {
    on_each(|stage, client, kind| {
        let first = walk(client, "3/sub/file").unwrap();
        client.open(first.node, libc::O_RDONLY).unwrap();
        assert_eq!(client.open(first.node, libc::O_RDWR), Err(libc::EROFS));
        assert_eq!(set(client, first.node, SIZE, 1), Err(libc::EROFS));
        let file = walk(client, "1/file").unwrap();
        assert_eq!(file.node, first.node, "{kind}");
        let handle = client.open(file.node, libc::O_RDWR).unwrap();
        set(client, file.node, SIZE, 1000).unwrap();
        set(client, file.node, MODE, 0o100_741).unwrap();
        client.write((file.node, handle), 0, b"TEXT", 0, 0).unwrap();
        let seen = walk(client, "3/sub/file").unwrap();
        assert_eq!((seen.size, seen.mode & 0o777, seen.node), (1000, 0o741, file.node));
        // The guest's kernel judges its own read-only mounts; directories are two.
        let folder = walk(client, "3/sub").unwrap();
        let created = client.create(folder.node, "new", libc::O_RDWR, 0o600, 0);
        assert_eq!(created.unwrap_err(), libc::EROFS);
        assert_eq!(client.lookup(folder.node, "file").unwrap().node, file.node);
        set(client, file.node, SIZE, 3).unwrap();
        assert_eq!(fs::read(stage.path().join("disk/top/sub/file")).unwrap(), b"TEX");
    });
}

#[test]
fn a_file_goes_on_when_one_of_its_volumes_or_names_is_gone() {
    on_each(|stage, client, kind| {
        let file = walk(client, "0/sub/file").unwrap();
        let sub = walk(client, "0/sub").unwrap();
        let socket = client.mknod(sub.node, "s", libc::S_IFSOCK, 0).unwrap();
        assert_eq!(walk(client, "1/s").unwrap().node, socket.node);
        assert_eq!(walk(client, "1/file").unwrap().node, file.node);
        assert_eq!(walk(client, "2").unwrap().node, file.node);
        let folder = walk(client, "1").unwrap();
        stage.unmount(".volumes/g/0").unwrap();
        fs::remove_dir(stage.path().join(".volumes/g/0")).unwrap();
        assert_eq!(walk(client, "0").unwrap().node, 0);
        crowd(client, folder.node);
        assert_eq!(walk(client, "1/file").unwrap().node, file.node);
        let handle = client.open(file.node, libc::O_RDWR).unwrap();
        client.write((file.node, handle), 0, b"more", 0, 0).unwrap();
        assert_eq!(fs::read(stage.path().join("disk/top/sub/file")).unwrap(), b"more", "{kind}");
        // A name that goes by one volume is gone by the other; what is bound or open stays.
        let sub = walk(client, "1").unwrap();
        client.call(10, sub.node, &terminated("file")).unwrap();
        client.call(10, sub.node, &terminated("s")).unwrap();
        assert_eq!(client.lookup(sub.node, "s").unwrap().node, 0);
        crowd(client, folder.node);
        assert_eq!(attributes(client, socket.node).unwrap().mode & libc::S_IFMT, libc::S_IFSOCK);
        assert_eq!(walk(client, "2").unwrap().node, file.node);
        assert_eq!(attributes(client, file.node).unwrap().size, 4);
    });
}

#[test]
fn folders_are_reached_by_their_own_volume_when_another_was_gone_before() {
    on_each(|stage, client, kind| {
        let part = walk(client, "1").unwrap();
        let before = walk(client, "3/sub").unwrap();
        // Nothing holds the read-only mount, so its id may be given to the next.
        crowd(client, part.node);
        stage.unmount(".volumes/g/3").unwrap();
        fs::create_dir(stage.path().join(".volumes/g/5")).unwrap();
        stage.bind("disk/top", ".volumes/g/5").unwrap();
        let again = walk(client, "5/sub").unwrap();
        client.create(again.node, "new", libc::O_RDWR, 0o600, 0).unwrap();
        let old = client.lookup(before.node, "new");
        assert!(old.is_err() || before.node == again.node, "{kind}: {old:?}");
    });
}

/// Looks at so many files that no descriptor of earlier ones is held.
fn crowd(client: &mut Client, folder: u64) {
    let inner = client.lookup(folder, "inner").unwrap().node;
    for name in 0..100 {
        let name = name.to_string();
        if client.lookup(inner, &name).unwrap().node == 0 {
            client.mknod(inner, &name, libc::S_IFREG | 0o600, 0).unwrap();
        }
    }
}
