//! Ways out of the folder, by requests: the tree's own wall, without a jail. What is outside stays as it
//! was and unread.

use std::ffi::CString;
use std::fs::{create_dir, create_dir_all, metadata, read, write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};

use crate::client::{Client, Server, longs, terminated, words};

const ROOT: u64 = 1;
const FILE: u32 = libc::S_IFREG;
const SECRET: &[u8] = b"secret";

/// How long each race is run.
const RACE: Duration = Duration::from_millis(1200);

/// `secret` beside the folder `shared`.
fn outer() -> TempDir {
    let outer = tempdir().unwrap();
    create_dir(outer.path().join("shared")).unwrap();
    write(outer.path().join("secret"), SECRET).unwrap();
    outer
}

fn link(client: &mut Client, node: u64, name: &str) -> Result<Vec<u8>, i32> {
    client.call(13, ROOT, &[longs(&[node]), terminated(name)].concat())
}

/// SETATTR of size 0, mode 0777 or owner 77.
fn change(client: &mut Client, node: u64, valid: u32) -> Result<Vec<u8>, i32> {
    let mut body = words(&[valid, 0]);
    body.extend(longs(&[0; 6]));
    body.extend(words(&[0, 0, 0, 0o777, 0, 77, 77, 0]));
    client.call(4, node, &body)
}

/// CVE-2026-1386's class: who may write to the folder plants a link where one with more rights writes.
#[test]
fn nothing_is_written_or_read_through_a_planted_link() {
    let outer = outer();
    let secret = outer.path().join("secret");
    let before = metadata(&secret).unwrap();
    let mut server = Server::start(&outer.path().join("shared"), 1);
    let mut client = server.client();
    let number = std::os::fd::AsRawFd::as_raw_fd(server.control.as_ref().unwrap());
    for (name, target) in [
        ("absolute", secret.to_str().unwrap().to_owned()),
        ("relative", "../secret".to_owned()),
        ("magic", "/proc/self/cwd/../secret".to_owned()),
        ("root", "/proc/1/root/etc/passwd".to_owned()),
        ("descriptor", format!("/proc/self/fd/{number}")),
    ] {
        // The guest plants it itself.
        client.call(6, ROOT, &[terminated(name), terminated(&target)].concat()).unwrap();
        let node = client.lookup(ROOT, name).unwrap().node;
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_RDONLY | libc::O_DIRECTORY,
        ] {
            assert_eq!(client.open(node, flags), Err(libc::ENXIO), "{name}: open {flags:#x}");
            let created = client.create(ROOT, name, flags, FILE | 0o600, 0);
            assert_eq!(created.unwrap_err(), libc::ENXIO, "{name}: create {flags:#x}");
        }
        assert_eq!(client.lookup(node, "x"), Err(libc::ENOTDIR), "{name}: lookup");
        assert!(client.mkdir(node, "x", 0o700).is_err(), "{name}: mkdir");
        assert!(client.create(node, "x", libc::O_RDWR, FILE | 0o600, 0).is_err(), "{name}");
        assert!(change(&mut client, node, 1 << 3).is_err(), "{name}: size");
        // Of the link itself, or not at all.
        let _ = change(&mut client, node, 1 << 0);
        let _ = change(&mut client, node, 1 << 1 | 1 << 2);
        let _ = change(&mut client, node, 1 << 4 | 1 << 5);
        let value = [words(&[1, 0]), terminated("user.x"), b"x".to_vec()].concat();
        assert!(client.call(21, node, &value).is_err(), "{name}: xattr");
        // A hard link is one to the link, and no way round.
        let hard = format!("{name}-hard");
        link(&mut client, node, &hard).unwrap();
        let hard = client.lookup(ROOT, &hard).unwrap();
        assert_eq!((hard.node, hard.mode & libc::S_IFMT), (node, libc::S_IFLNK), "{name}");
    }
    assert!(link(&mut client, ROOT, "folder").is_err());
    assert_eq!(link(&mut client, ROOT, "../linked"), Err(libc::EINVAL));
    let after = metadata(&secret).unwrap();
    let told = |of: &std::fs::Metadata| {
        (of.len(), of.mode(), of.uid(), of.nlink(), of.mtime_nsec(), of.ctime_nsec())
    };
    assert_eq!(told(&after), told(&before));
    assert_eq!(read(&secret).unwrap(), SECRET);
}

#[test]
fn numbers_that_were_not_given_are_nothing() {
    let outer = outer();
    write(outer.path().join("shared/file"), "").unwrap();
    let mut server = Server::start(&outer.path().join("shared"), 1);
    let mut client = server.client();
    let file = client.lookup(ROOT, "file").unwrap().node;
    let inode = metadata(outer.path().join("secret")).unwrap().ino();
    for number in [0, 2, 3, 99, inode, u64::MAX].into_iter().filter(|number| *number != file) {
        assert_eq!(client.open(number, libc::O_RDONLY), Err(libc::ESTALE), "node {number}");
        assert_eq!(client.lookup(number, "secret"), Err(libc::ESTALE), "node {number}");
        assert_eq!(link(&mut client, number, "linked"), Err(libc::ESTALE), "node {number}");
    }
    // Descriptors' numbers are no handles.
    for handle in [0, 1, 2, 3, 4, 5, u64::MAX] {
        assert_eq!(client.read((file, handle), 0, 1), Err(libc::EBADF), "handle {handle}");
    }
    // As NFS would find a parent.
    for name in [".", ".."] {
        assert_eq!(client.lookup(file, name), Err(libc::EINVAL));
    }
}

/// Runs `disturb` in another thread as long as `walk` is repeated here.
fn race(disturb: impl Fn() + Sync, mut walk: impl FnMut()) {
    let (end, deadline) = (AtomicBool::new(false), Instant::now() + RACE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                disturb();
            }
        });
        while Instant::now() < deadline {
            walk();
        }
        end.store(true, Ordering::Relaxed);
    });
}

fn exchange(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
    // SAFETY: both paths are terminated and outlive the call.
    let result =
        unsafe { libc::renameat2(-1, one.as_ptr(), -1, other.as_ptr(), libc::RENAME_EXCHANGE) };
    assert_eq!(result, 0);
}

/// Looks up the names and reads the last; less than nothing where that fails.
fn walk(client: &mut Client, names: &[&str]) -> Result<Vec<u8>, i32> {
    let mut node = ROOT;
    for name in names {
        node = match client.lookup(node, name)?.node {
            0 => return Err(libc::ENOENT),
            node => node,
        };
    }
    let handle = client.open(node, libc::O_RDONLY)?;
    let read = client.read((node, handle), 0, 100);
    client.call(18, node, &[longs(&[handle]), words(&[0; 4])].concat()).unwrap();
    read
}

#[test]
fn a_folder_that_becomes_a_link_is_never_followed() {
    let outer = outer();
    let (folder, link) = (outer.path().join("shared/a"), outer.path().join("shared/b"));
    create_dir(&folder).unwrap();
    write(folder.join("secret"), "own").unwrap();
    symlink(outer.path(), &link).unwrap();
    let mut server = Server::start(&outer.path().join("shared"), 1);
    let mut client = server.client();
    let (mut own, mut refused) = (0, 0);
    race(
        || exchange(&folder, &link),
        || match walk(&mut client, &["a", "secret"]) {
            Ok(content) => {
                assert_eq!(content, b"own");
                own += 1;
            }
            Err(_) => refused += 1,
        },
    );
    assert!(own > 0 && refused > 0, "no race: {own}, {refused}");
}

#[test]
fn a_folder_that_is_moved_out_is_no_way_up() {
    let outer = outer();
    let inside = outer.path().join("shared/moving");
    let outside = outer.path().join("moved");
    create_dir_all(inside.join("deep")).unwrap();
    write(inside.join("deep/own"), "own").unwrap();
    let mut server = Server::start(&outer.path().join("shared"), 1);
    let mut client = server.client();
    let moving = client.lookup(ROOT, "moving").unwrap().node;
    let deep = client.lookup(moving, "deep").unwrap().node;
    let mut found = 0;
    race(
        || {
            std::fs::rename(&inside, &outside).unwrap();
            std::fs::rename(&outside, &inside).unwrap();
        },
        || {
            for node in [moving, deep] {
                for name in ["..", "../..", "../secret", "../../secret"] {
                    assert_eq!(client.lookup(node, name), Err(libc::EINVAL));
                }
                // Not beneath them, wherever they are.
                assert_eq!(client.lookup(node, "secret").unwrap().node, 0);
            }
            // Listed, the way up has no number to go by.
            assert!(client.list(moving).iter().all(|(name, up)| name == "deep" || up.node == 0));
            match walk(&mut client, &["moving", "deep", "own"]) {
                Ok(content) => {
                    assert_eq!(content, b"own");
                    found += 1;
                }
                Err(error) => assert_eq!(error, libc::ENOENT),
            }
        },
    );
    assert!(found > 0);
}
