//! A file system for tests, as one on a network is whose server has gone: it answers until it is told to
//! fall silent, and from then on takes every request and never answers.
//!
//! FUSE without a library: `include/uapi/linux/fuse.h` has the messages. Whoever waits for an answer waits
//! as deep in the kernel as with NFS: SIGKILL does not end it.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Bytes of `struct fuse_in_header` and of `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// More than the longest request to a file system that takes writes of a page.
const LONGEST: usize = 1 << 17;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// A mounted file system with one empty folder. Dropping answers everybody with an error and unmounts it.
#[derive(Debug)]
pub struct SilentFs {
    target: PathBuf,
    silent: Arc<AtomicBool>,
    unanswered: Arc<AtomicUsize>,
    server: Option<JoinHandle<()>>,
}

impl SilentFs {
    /// Mounts the file system on the folder `target`, in the mount namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If this kernel has no FUSE, or the caller may not mount.
    pub fn mount(target: &Path) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("silent"), target, Some("fuse"), flags, Some(options.as_str()))?;
        let silent = Arc::<AtomicBool>::default();
        let unanswered = Arc::<AtomicUsize>::default();
        let server = std::thread::Builder::new().name("silent".to_owned()).spawn({
            let (silent, unanswered) = (Arc::clone(&silent), Arc::clone(&unanswered));
            move || serve(device, &silent, &unanswered)
        })?;
        Ok(Self { target: target.to_owned(), silent, unanswered, server: Some(server) })
    }

    /// From now on nothing is answered.
    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    /// The number of requests that wait for an answer, which does not come.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::SeqCst)
    }
}

impl Drop for SilentFs {
    fn drop(&mut self) {
        // The force ends the connection: all requests fail, whichever mount they came by, and the server's
        // reading with them.
        let _ = umount2(&self.target, MntFlags::MNT_FORCE);
        let gone = umount2(&self.target, MntFlags::MNT_DETACH);
        if matches!(gone, Ok(()) | Err(Errno::EINVAL | Errno::ENOENT))
            && let Some(server) = self.server.take()
        {
            let _ = server.join();
        }
    }
}

fn serve(mut device: File, silent: &AtomicBool, unanswered: &AtomicUsize) {
    let mut buffer = vec![0; LONGEST];
    loop {
        let request = match device.read(&mut buffer) {
            Ok(length) if length >= IN_HEADER => &buffer[..length],
            // ENOENT: the request was taken back in this moment.
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::NotFound) => {
                continue;
            }
            // ENODEV: it has been unmounted.
            _ => return,
        };
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| request[at + byte]));
        let opcode = word(4);
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        if silent.load(Ordering::SeqCst) {
            unanswered.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let (error, body) = match answer(opcode) {
            Ok(body) => (0, body),
            Err(errno) => (-(errno as i32), Vec::new()),
        };
        let length = u32::try_from(OUT_HEADER + body.len()).unwrap_or(0);
        let mut reply = length.to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(&request[8..16]);
        reply.extend(body);
        // Refused if nobody waits any more.
        let _ = device.write(&reply);
    }
}

/// The body of the answer to a request of this opcode.
fn answer(opcode: u32) -> Result<Vec<u8>, Errno> {
    match opcode {
        INIT => {
            let mut body = [7_u32, 31].map(u32::to_ne_bytes).concat();
            body.resize(64, 0);
            // max_write and time_gran.
            body[20..28].copy_from_slice(&[4096_u32, 1].map(u32::to_ne_bytes).concat());
            Ok(body)
        }
        GETATTR => {
            // Valid for no time: each look is a request.
            let mut body = vec![0; 104];
            body[16..24].copy_from_slice(&1_u64.to_ne_bytes());
            body[76..80].copy_from_slice(&0o40755_u32.to_ne_bytes());
            body[80..84].copy_from_slice(&2_u32.to_ne_bytes());
            Ok(body)
        }
        OPENDIR => Ok(vec![0; 16]),
        READDIR | RELEASEDIR => Ok(Vec::new()),
        STATFS => Ok(vec![0; 80]),
        LOOKUP => Err(Errno::ENOENT),
        _ => Err(Errno::ENOSYS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};

    /// In a thread with a mount namespace of its own: nothing is mounted on this machine.
    #[test]
    fn a_folder_is_listed_until_the_silence_and_everybody_goes_on_at_the_end() {
        let test = || {
            let none = None::<&str>;
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            let own = unshare(CloneFlags::CLONE_NEWNS)
                .and_then(|()| mount(none, "/", none, private, none))
                .map_err(io::Error::from);
            let folder = tempfile::tempdir().unwrap();
            let mounted = own.and_then(|()| SilentFs::mount(folder.path()));
            let Ok(silent) = mounted else { return husk_skip::skipped("no FUSE can be mounted") };
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
            silent.fall_silent();
            std::thread::scope(|scope| {
                let look = scope.spawn(|| std::fs::read_dir(folder.path()).map(Iterator::count));
                while silent.unanswered() == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(!look.is_finished());
                drop(silent);
                look.join().unwrap().unwrap_err();
            });
        };
        husk_skip::spawn(test).join().unwrap();
    }
}
