//! The shim as a process of its own: how `start` spawns it, and how it settles in.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getppid, setsid};

use crate::arguments::StartOptions;

/// Where the shim finds its listening socket.
const LISTENER: RawFd = 3;

/// Spawns the shim in the bundle's folder, with the listening socket; returns its process id.
pub fn spawn(
    options: &StartOptions,
    address: &str,
    listener: &UnixListener,
) -> anyhow::Result<Pid> {
    let program = std::env::current_exe().context("the shim's own program")?;
    let program = CString::new(program.into_os_string().into_vec())?;
    let mut arguments = vec![program.clone()];
    for (flag, value) in [
        ("-namespace", options.namespace.as_str()),
        ("-id", &options.id),
        ("-address", &options.address),
        ("-publish-binary", &options.publish_binary),
        ("-socket", address),
    ] {
        arguments.push(CString::new(flag)?);
        arguments.push(CString::new(value)?);
    }
    if let Some(path) = &options.configuration {
        arguments.push(c"-config".to_owned());
        arguments.push(CString::new(path.as_str())?);
    }
    if options.debug {
        arguments.push(c"-debug".to_owned());
    }
    let mut environment = vec![CString::new(format!("TTRPC_ADDRESS={}", options.ttrpc_address))?];
    for name in ["HUSK_CONFIG", "PATH"] {
        if let Some(value) = std::env::var_os(name) {
            let mut variable = format!("{name}=").into_bytes();
            variable.extend(value.into_vec());
            environment.push(CString::new(variable)?);
        }
    }
    let pid = spawn_with(&program, listener, &arguments, &environment).context("the shim")?;
    // Like containerd's own shim: a little before containerd when memory runs out.
    adjust_oom_score(pid).context("the shim's OOM score")?;
    Ok(pid)
}

fn spawn_with(
    program: &CString,
    listener: &UnixListener,
    arguments: &[CString],
    environment: &[CString],
) -> Result<Pid, Errno> {
    let mut actions = PosixSpawnFileActions::init()?;
    // containerd reads our output to its end: the shim must not hold it open.
    actions.add_open(0, c"/dev/null", OFlag::O_RDONLY, Mode::empty())?;
    actions.add_open(1, c"/dev/null", OFlag::O_WRONLY, Mode::empty())?;
    actions.add_open(2, c"/dev/null", OFlag::O_WRONLY, Mode::empty())?;
    actions.add_dup2(listener.as_raw_fd(), LISTENER)?;
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
    posix_spawn(program.as_c_str(), &actions, &attributes, arguments, environment)
}

fn adjust_oom_score(pid: Pid) -> anyhow::Result<()> {
    let parent = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", getppid()))?;
    let score = (parent.trim().parse::<i32>()? + 1).min(1000);
    let path = format!("/proc/{pid}/oom_score_adj");
    OpenOptions::new().write(true).open(path)?.write_all(score.to_string().as_bytes())?;
    Ok(())
}

/// Makes the process a shim: a session and a mount namespace of its own. Called first, while there
/// is one thread; returns the listening socket, and the mount namespace it has left.
pub fn settle() -> anyhow::Result<(UnixListener, File)> {
    match setsid() {
        // A leader already: started by hand from a shell's job control.
        Ok(_) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(errno).context("session"),
    }
    let mounts = File::open("/proc/self/ns/mnt").context("the host's mount namespace")?;
    unshare(CloneFlags::CLONE_NEWNS).context("mount namespace")?;
    // The host's mounts come to us, ours stay here.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .context("mount propagation")?;
    nix::fcntl::fcntl(
        // SAFETY: only looked at by the call.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(LISTENER) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .context("no listening socket; this program is run by containerd")?;
    // SAFETY: `start` left the socket there for us, and nobody else takes it.
    let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(LISTENER) });
    listener.local_addr().context("descriptor 3 is no listening socket")?;
    listener.set_nonblocking(true)?;
    Ok((listener, mounts))
}
