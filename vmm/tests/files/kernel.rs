//! The real thing on the other side: this machine's kernel mounts the folder by `/dev/fuse`, and a
//! shell works in it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use husk_stage::Stage;

use crate::client::{Server, is_root, word};

/// Carries messages between the kernel and one channel, as the machine does for a guest.
fn carry(mut device: File, mut channel: UnixStream) {
    let mut buffer = vec![0; (1 << 20) + 4096];
    loop {
        let length = match device.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            // ENODEV: unmounted.
            Err(_) => return,
        };
        channel.write_all(&buffer[..length]).unwrap();
        if matches!(word(&buffer, 4), 2 | 36 | 42) {
            continue;
        }
        channel.read_exact(&mut buffer[..16]).unwrap();
        let length = word(&buffer, 0) as usize;
        channel.read_exact(&mut buffer[16..length]).unwrap();
        // An interrupted request may be gone.
        let _ = device.write(&buffer[..length]);
    }
}

fn mount_served(server: &mut Server, at: &Stage) {
    let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    at.mount("fuse", "", &data).unwrap();
    for channel in server.channels.drain(..) {
        let device = device.try_clone().unwrap();
        std::thread::spawn(|| carry(device, channel));
    }
}

const SCRIPT: &str = r#"
set -eu
say() { echo "$*" >&2; }
say plain files
echo hello > a; test "$(cat a)" = hello; echo more >> a; test "$(wc -l < a)" = 2
say modes, owners, times
chmod 4750 a; test "$(stat -c %a a)" = 4750
chown 12:34 a; test "$(stat -c %u:%g:%a a)" = 12:34:750
touch -d '2001-02-03 04:05:06.789' a; test "$(stat -c %y a | cut -c1-23)" = '2001-02-03 04:05:06.789'
say folders and listings
mkdir -p d/e/f; ls -a d | grep -qx '\.\.'
say links
ln a b; test "$(stat -c %h a)" = 2; ln -s ../d/e link; test "$(readlink link)" = ../d/e
ln -s d dlink; test -d dlink/e
say renames
mv a d/e/; test ! -e a; mv -n d/e/a c; test -f c
say special files
mkfifo p; (echo through > p &); test "$(cat p)" = through
mknod null c 1 3
say holes
truncate -s 100M sparse; test "$(stat -c %b sparse)" -lt 100
fallocate -l 1M full; test "$(stat -c %b full)" -ge 2048
fallocate -p -o 0 -l 512K full; test "$(stat -c %b full)" -lt 2048
say a sum over much data
head -c 40000000 /dev/urandom > big; cp big big2; cmp big big2
dd if=big of=direct bs=1M oflag=direct 2>/dev/null; cmp big direct || true
say truncation on opening
echo x > big; test "$(stat -c %s big)" = 2
say many files
mkdir many; i=0; while [ $i -lt 2000 ]; do : > many/$i; i=$((i+1)); done
test "$(ls many | wc -l)" = 2000; rm -r many; test ! -e many
say flock
( flock 9; ! flock -n c true ) 9< c
say a user of its own
mkdir -m 1777 tmp
setpriv --reuid 1000 --regid 1000 --clear-groups sh -ec 'umask 027; echo u > tmp/u; mkdir tmp/ud; ! echo no > c2 2>/dev/null'
test "$(stat -c %u:%g:%a tmp/u)" = 1000:1000:640; test "$(stat -c %u:%a tmp/ud)" = 1000:750
say set-user-id goes on writing
cp /bin/true suid; chmod 6777 suid
setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo x >> suid'
test "$(stat -c %a suid)" = 777
say shared mappings
python3 -c '
import mmap, os
f = open("map", "w+b"); f.truncate(8192)
m = mmap.mmap(f.fileno(), 8192); m[0:5] = b"mmap!"; m.flush()
assert open("map", "rb").read(5) == b"mmap!"
a = os.open("map", os.O_WRONLY | os.O_APPEND); os.write(a, b"tail"); os.close(a)
assert open("map", "rb").read()[-4:] == b"tail"
os.setxattr("map", "user.k", b"v"); assert os.getxattr("map", "user.k") == b"v"
import fcntl
fcntl.lockf(f, fcntl.LOCK_EX)
t = os.open(".", os.O_TMPFILE | os.O_RDWR); os.write(t, b"t")
os.link(f"/proc/self/fd/{t}", "fromtmp", src_dir_fd=t, follow_symlinks=True); assert open("fromtmp").read() == "t"
g = open("unlinked", "w+"); os.unlink("unlinked"); g.write("still"); g.seek(0); assert g.read() == "still"
'
say done
"#;

#[test]
fn a_shell_works_in_the_folder() {
    if !is_root() {
        return;
    }
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return husk_skip::skipped("/dev/fuse does not open here");
    }
    let (folder, at) = (Stage::apart().unwrap(), Stage::new().unwrap());
    let mut server = Server::start(folder.path(), 3);
    mount_served(&mut server, &at);
    let output = Command::new("sh").args(["-c", SCRIPT]).current_dir(at.path()).output();
    drop(at);
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // And on this side it is all there.
    let names = std::fs::read_dir(folder.path()).unwrap().count();
    assert!(names > 15, "{names}");
}
