//! More files than there are descriptors.

use std::fs;

use crate::client::{Client, is_root, longs, terminated, words};
use crate::serve;

/// Files of the tree, in directories of a thousand.
const FILES: usize = 100_000;

#[test]
fn a_tree_is_walked_that_has_more_files_than_there_are_descriptors() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for file in 0..FILES {
        let parent = folder.path().join(format!("{}", file / 1000));
        if file % 1000 == 0 {
            fs::create_dir(&parent).unwrap();
        }
        fs::write(parent.join(format!("{file}")), format!("{file}")).unwrap();
    }
    let mut client = serve(folder.path());
    let mut files = Vec::new();
    for (name, parent) in client.list(1) {
        if name.starts_with('.') {
            continue;
        }
        files.extend(
            client
                .list(parent.node)
                .into_iter()
                .filter(|(name, _)| !name.starts_with('.'))
                .map(|(name, entry)| (name, entry.node, parent.node)),
        );
    }
    assert_eq!(files.len(), FILES);
    // All of them are remembered, and each is still the one that it was.
    for (name, node, _) in files.iter().step_by(7) {
        let handle = client.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(client.read((*node, handle), 0, 100).unwrap(), name.as_bytes());
        client.call(18, *node, &[longs(&[handle]), words(&[0; 4])].concat()).unwrap();
    }
    // And what comes after.
    for (name, node, parent) in files.iter().step_by(1001) {
        let body = [longs(&[1]), terminated(name), terminated(name)].concat();
        client.call(12, *parent, &body).unwrap();
        client.open(*node, libc::O_RDONLY).map(drop).unwrap_or_else(|error| {
            // Handles are what the descriptors are for.
            assert_eq!(error, libc::ENFILE);
        });
    }
    assert_eq!(client.lookup(1, "no").unwrap().node, 0);
    client.create(1, "after", libc::O_RDWR, libc::S_IFREG | 0o600, 0).unwrap_err();
    client.mkdir(1, "folder-after", 0o700).unwrap();
}

#[test]
fn what_finds_no_room_leaves_nothing_behind() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(folder.path().join("there"), "text").unwrap();
    let mut client = serve(folder.path());
    let there = client.lookup(1, "there").unwrap().node;
    let mut handles = Vec::new();
    loop {
        match client.open(there, libc::O_RDONLY) {
            Ok(handle) => handles.push(handle),
            Err(error) => break assert_eq!(error, libc::ENFILE),
        }
    }
    let (flags, mode) = (libc::O_RDWR | libc::O_CREAT, libc::S_IFREG | 0o600);
    let create = |client: &mut Client, name: &str| client.create(1, name, flags, mode, 0).map(drop);
    assert_eq!(create(&mut client, "new"), Err(libc::ENFILE));
    assert_eq!(create(&mut client, "there"), Err(libc::ENFILE));
    assert_eq!(client.open(there, libc::O_RDWR | libc::O_TRUNC), Err(libc::ENFILE));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(folder.path().join("there")).unwrap(), "text");
    // There is room again when one is closed.
    let body = [longs(&[handles[0]]), words(&[0; 4])].concat();
    client.call(18, there, &body).unwrap();
    create(&mut client, "new").unwrap();
    assert_eq!(create(&mut client, "newer"), Err(libc::ENFILE));
}
