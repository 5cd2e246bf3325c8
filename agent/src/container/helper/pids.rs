//! `container pids`: makes a PID namespace for containers to share, where no container of the
//! sandbox's own is there to share that of.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, pivot_root, setgid, setgroups, setuid};

use crate::container::helper::report::{Because, Failure};
use crate::init::calls;

/// Nobody, on every system.
const NOBODY: u32 = 65534;

/// Any directory: an empty one is mounted on it, in a mount namespace of its own.
const PLACE: &str = "/proc";

/// Makes the namespace; the answer is the process id of its first process.
pub fn run() -> Result<i32, Failure> {
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS).because("namespaces")?;
    empty_root().because("empty root")?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    // Before there is a child: none of its signals is to be missed.
    mask.thread_set_mask().because("signal mask")?;
    match calls::fork().because("fork")? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => hold(&mask),
    }
}

/// Containers see this process: through it nothing else is to be seen.
fn empty_root() -> nix::Result<()> {
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, private, none)?;
    mount(Some("none"), PLACE, Some("tmpfs"), MsFlags::MS_RDONLY, Some("mode=0555"))?;
    chdir(PLACE)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

/// The namespace's first process: collects orphans until it is killed.
fn hold(mask: &SigSet) -> ! {
    let nobody = || {
        setgroups(&[])?;
        setgid(Gid::from_raw(NOBODY))?;
        // With root's id all capabilities go.
        setuid(Uid::from_raw(NOBODY))
    };
    if nobody().is_err() {
        std::process::exit(1);
    }
    loop {
        // Fails only for a mask of impossible signals.
        let _ = mask.wait();
        let collect = || waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG));
        while collect().is_ok_and(|status| status != WaitStatus::StillAlive) {}
    }
}
