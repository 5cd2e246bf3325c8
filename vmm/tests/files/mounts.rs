//! Mounts below the folder.

use husk_stage::Stage;

use crate::client::{Client, Server, is_root, longs, terminated, word, words};

#[test]
fn mounts_made_later_show_and_are_told_apart() {
    if !is_root() {
        return;
    }
    let folder = Stage::apart().unwrap();
    for name in ["one", "two", "bound", "plain"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("plain/file"), "").unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let before = client.lookup(1, "one").unwrap();
    assert_eq!(before.flags, 0);
    for name in ["one", "two"] {
        let at = folder.mount("tmpfs", name, "").unwrap();
        std::fs::write(at.join("file"), name).unwrap();
    }
    folder.bind("plain", "bound").unwrap();
    let one = client.lookup(1, "one").unwrap();
    let two = client.lookup(1, "two").unwrap();
    assert_ne!(one.node, before.node);
    assert_eq!((one.flags, two.flags), (1, 1), "FUSE_ATTR_SUBMOUNT");
    let in_one = client.lookup(one.node, "file").unwrap();
    let in_two = client.lookup(two.node, "file").unwrap();
    // Two new tmpfs number their files alike: that is what is to be told apart.
    assert_eq!(in_one.inode, in_two.inode);
    assert_ne!(in_one.node, in_two.node);
    let handle = client.open(in_two.node, 0).unwrap();
    assert_eq!(client.read((in_two.node, handle), 0, 10).unwrap(), b"two");
    // The same file in two places has two nodes.
    let plain = client.lookup(1, "plain").unwrap();
    let bound = client.lookup(1, "bound").unwrap();
    assert_eq!((plain.flags, bound.flags), (0, 1));
    let direct = client.lookup(plain.node, "file").unwrap();
    let through = client.lookup(bound.node, "file").unwrap();
    assert_eq!(direct.inode, through.inode);
    assert_ne!(direct.node, through.node);
    // Read-only mounts refuse, whoever asks.
    folder.make_read_only("bound").unwrap();
    let created = client.create(bound.node, "new", libc::O_RDWR, libc::S_IFREG | 0o600, 0);
    assert_eq!(created.unwrap_err(), libc::EROFS);
    assert_eq!(client.open(through.node, libc::O_RDWR), Err(libc::EROFS));
    client.open(direct.node, libc::O_RDWR).unwrap();
}

#[test]
fn the_agent_hears_how_long_a_name_is_believed() {
    if !is_root() {
        return;
    }
    let folder = Stage::apart().unwrap();
    std::fs::create_dir(folder.path().join("rootfs")).unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let get = |client: &mut Client, node: u64, size: u32| {
        let mut body = words(&[size, 0]);
        body.extend(terminated(husk_control::VALIDITY_ATTRIBUTE));
        client.call(22, node, &body)
    };
    let left =
        |client: &mut Client| i64::from_le_bytes(get(client, 1, 8).unwrap().try_into().unwrap());
    assert!(left(&mut client) <= 0);
    let at = folder.mount("tmpfs", "rootfs", "").unwrap();
    let root = client.lookup(1, "rootfs").unwrap();
    // Nothing is believed of a mount until the agent has asked after it was entered.
    assert_eq!(client.lookup(root.node, "none").unwrap().node, 0);
    assert!(left(&mut client) <= 0);
    assert_eq!(client.lookup(root.node, "none").unwrap().node, 0);
    let now = left(&mut client);
    assert!((0..20_000_000).contains(&now), "{now} ns");
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(left(&mut client) < 0);
    // What is asked of the share's own tree is nothing that the host changes.
    client.call(3, 1, &[0; 16]).unwrap();
    assert!(left(&mut client) < 0);
    assert_eq!(word(&get(&mut client, 1, 0).unwrap(), 0), 8);
    assert_eq!(get(&mut client, 1, 4), Err(libc::ERANGE));
    // Elsewhere it is an attribute like any other.
    std::fs::write(at.join("file"), "").unwrap();
    let file = client.lookup(root.node, "file").unwrap();
    assert!(matches!(get(&mut client, file.node, 8), Err(libc::ENODATA | libc::EOPNOTSUPP)));
}

#[test]
fn announced_operations_are_answered_and_not_done() {
    if !is_root() {
        return;
    }
    let folder = Stage::apart().unwrap();
    std::fs::write(folder.path().join("file"), "text").unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let announce = |client: &mut Client, node: u64, text: &[u8]| {
        let mut body = words(&[u32::try_from(text.len()).unwrap(), 0]);
        body.extend(terminated(husk_control::REPEAT_ATTRIBUTE));
        body.extend(text);
        assert_eq!(client.call(21, node, &body), Err(libc::EALREADY));
    };
    announce(&mut client, 1, b"create\0new\0");
    assert_eq!(client.lookup(1, "new").unwrap().node, 0);
    let made = client.mkdir(1, "new", 0o700).unwrap();
    assert!(made.node >= 1 << 63 && !folder.path().join("new").exists());
    announce(&mut client, 1, b"remove\0file\0");
    assert!(client.lookup(1, "file").unwrap().node >= 1 << 63);
    client.call(10, 1, &terminated("file")).unwrap();
    assert!(folder.path().join("file").exists());
    announce(&mut client, 1, b"rename\0file\0other\0");
    let mut body = longs(&[1]);
    body.extend([terminated("file"), terminated("other")].concat());
    client.call(12, 1, &body).unwrap();
    assert!(folder.path().join("file").exists() && !folder.path().join("other").exists());
    announce(&mut client, 1, b"");
    let file = client.lookup(1, "file").unwrap();
    // `change` lets the file be opened for writing where that is refused, and nothing be written.
    announce(&mut client, file.node, b"change\0");
    let handle = client.open(file.node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), b"text");
    assert!(client.write((file.node, handle), 0, b"x", 0, 0).is_err());
    // Of another file it is not meant.
    client.call(10, 1, &terminated("file")).unwrap();
    assert!(!folder.path().join("file").exists());
    let mut body = words(&[4, 0]);
    body.extend(terminated(husk_control::REPEAT_ATTRIBUTE));
    body.extend(b"else");
    assert_eq!(client.call(21, 1, &body), Err(libc::EINVAL));
}

#[test]
fn without_acls_no_file_has_one() {
    if !is_root() {
        return;
    }
    let folder = Stage::apart().unwrap();
    folder.mount("ramfs", "", "").unwrap();
    let mut server = Server::start(folder.path(), 1);
    let mut client = server.client();
    let mut get = |name: &str| {
        let mut body = words(&[100, 0]);
        body.extend(terminated(name));
        client.call(22, 1, &body)
    };
    assert_eq!(get("system.posix_acl_access"), Err(libc::ENODATA));
    assert_eq!(get("system.posix_acl_default"), Err(libc::ENODATA));
    assert_eq!(get("user.x"), Err(libc::EOPNOTSUPP));
}
