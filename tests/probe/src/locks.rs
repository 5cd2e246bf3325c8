//! Locks between two processes.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// What a child process finds: exit code 0 if `check` holds there.
fn in_child(check: impl FnOnce() -> bool) -> Result<bool> {
    // SAFETY: this program has one thread, so the child may do what it likes.
    match unsafe { fork() }? {
        ForkResult::Child => std::process::exit(i32::from(!check())),
        ForkResult::Parent { child } => Ok(waitpid(child, None)? == WaitStatus::Exited(child, 0)),
    }
}

fn file(folder: &str, name: &str) -> Result<std::path::PathBuf> {
    let path = Path::new(folder).join(name);
    std::fs::write(&path, [0; 100])?;
    Ok(path)
}

/// `flock`: another process is refused until the lock is dropped.
pub fn flock(folder: &str) -> Result<()> {
    let path = file(folder, "flock")?;
    let try_lock = || File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
    let held = File::open(&path)?;
    held.lock()?;
    ensure!(in_child(|| !try_lock())?, "a held lock was given again");
    held.unlock()?;
    ensure!(in_child(try_lock)?, "a free lock was refused");
    println!("flock");
    Ok(())
}

/// Locks a file, which it makes, for ever.
pub fn hold(path: &str) -> Result<()> {
    let file = File::create(path)?;
    file.lock()?;
    loop {
        std::thread::park();
    }
}

/// Says whether a file can be locked.
pub fn try_once(path: &str) -> Result<()> {
    let file = File::open(path)?;
    println!("{}", if file.try_lock().is_ok() { "free" } else { "held" });
    Ok(())
}

/// POSIX record locks: overlapping ranges conflict between processes, others do not.
pub fn posix(folder: &str) -> Result<()> {
    const WRITE: i16 = 1; // F_WRLCK
    const UNLOCK: i16 = 2; // F_UNLCK
    let path = file(folder, "posix")?;
    let lock = |file: &File, start: i64, kind: i16| {
        let range = libc::flock {
            l_type: kind,
            l_whence: 0, /* SEEK_SET */
            l_start: start,
            l_len: 10,
            l_pid: 0,
        };
        fcntl(file, FcntlArg::F_SETLK(&range))
    };
    let open = || File::options().read(true).write(true).open(&path);
    let held = open()?;
    lock(&held, 0, WRITE)?;
    ensure!(
        in_child(|| {
            let Ok(file) = open() else { return false };
            let refused = lock(&file, 5, WRITE);
            matches!(refused, Err(Errno::EAGAIN | Errno::EACCES)) && lock(&file, 10, WRITE).is_ok()
        })?,
        "ranges"
    );
    lock(&held, 0, UNLOCK)?;
    ensure!(in_child(|| open().is_ok_and(|file| lock(&file, 0, WRITE).is_ok()))?, "freed");
    println!("posix-lock");
    Ok(())
}
