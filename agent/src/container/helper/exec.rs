//! `container exec`: makes a process in a container that runs.
//!
//! libcontainer's own way would leave the container's seccomp profile behind. So this joins the
//! container by itself: cgroup, namespaces, a fork for the PID namespace, then the steps of any
//! process in runc's order, with libcontainer's calls for capabilities, limits and seccomp.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{capabilities, seccomp};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{ForkResult, Gid, Uid, chdir, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Process, Spec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::container::helper::ExecRequest;
use crate::container::helper::command::Command;
use crate::container::helper::console::Sender;
use crate::container::helper::lookup;
use crate::container::helper::priority;
use crate::container::helper::report::{Because, Failure, Report};
use crate::container::helper::terminal;
use crate::container::validity::End;
use crate::init::calls;
use crate::init::mounts::CGROUP_ROOT;

/// Makes the process that the request in `directory` asks for; the answer is its process id.
pub fn run(directory: &Path, report: &Report) -> Result<i32, Failure> {
    let request = fs::read(directory.join("exec.json")).because("read the request")?;
    let request: ExecRequest = serde_json::from_slice(&request).because("read the request")?;
    let spec = Spec::load(request.bundle.join("config.json")).because("read the spec")?;
    let console = request.console.as_deref().map(Sender::connect).transpose();
    let console = console.because("terminal")?;
    let syscall = create_syscall();
    // An answer that does not come is no reason to start nothing.
    let end = request.validity.end().ok();

    let doors = Doors::open(&request).because("open the cgroup")?;
    let own = request.process.oom_score_adj();
    if let Some(score) = own.or(spec.process().as_ref().and_then(Process::oom_score_adj)) {
        fs::write("/proc/self/oom_score_adj", score.to_string()).because("set oom_score_adj")?;
    }
    for limit in request.process.rlimits().iter().flatten() {
        syscall.set_rlimit(limit).because("set a resource limit")?;
    }
    // Or processes of the container could reach this one, and through it the agent's file.
    nix::sys::prctl::set_dumpable(false).because("hide from the container")?;
    join_namespaces(&request, &spec)?;
    match calls::fork().because("fork")? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            let failure = match doors.enter().because("join the cgroup") {
                Ok(()) => become_process(&request, &spec, (console, end), report, &*syscall),
                Err(failure) => failure,
            };
            report.failed(&failure);
            std::process::exit(1)
        }
    }
}

/// The doors of the container's cgroup, opened while they can be seen: only the child goes through,
/// so that the helper is never one of the container's processes.
struct Doors {
    container: File,
    init: Option<File>,
}

impl Doors {
    fn open(request: &ExecRequest) -> io::Result<Self> {
        let door = |cgroup: &Path| File::options().write(true).open(cgroup.join("cgroup.procs"));
        let lines = fs::read_to_string(format!("/proc/{}/cgroup", request.init))?;
        let own = lines.lines().find_map(|line| line.strip_prefix("0::/"));
        let init = own.map(|own| Path::new(CGROUP_ROOT).join(own));
        let init = init.filter(|init| *init != request.cgroup).and_then(|init| door(&init).ok());
        Ok(Self { container: door(&request.cgroup)?, init })
    }

    /// Enters the container's cgroup, or, if that has been divided and takes no processes any more
    /// (a container with its own init system does so), the one that its init is in.
    fn enter(mut self) -> io::Result<()> {
        match (self.container.write_all(b"0"), self.init) {
            (Err(error), Some(mut init))
                if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP)) =>
            {
                init.write_all(b"0")
            }
            (result, _) => result,
        }
    }
}

fn join_namespaces(request: &ExecRequest, spec: &Spec) -> Result<(), Failure> {
    let linux = spec.linux().as_ref();
    let mut flags = CloneFlags::empty();
    for namespace in linux.iter().filter_map(|linux| linux.namespaces().as_ref()).flatten() {
        flags |= match namespace.typ() {
            LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
            LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
        };
    }
    let init = i32::try_from(request.init).ok().and_then(Pid::from_raw);
    let init = init.ok_or_else(|| Failure::other("the container has no process"))?;
    let init = pidfd_open(init, PidfdFlags::empty()).because("the container's process")?;
    // One call joins all of them or none, in the order that their owners need.
    setns(&init, flags).because("join the namespaces")
}

/// What the child does; comes back only if something fails.
fn become_process(
    request: &ExecRequest,
    spec: &Spec,
    (console, end): (Option<Sender>, Option<End>),
    report: &Report,
    syscall: &dyn Syscall,
) -> Failure {
    let environment = request.process.env().clone().unwrap_or_default();
    let command = Command::new(environment, None, report.clone());
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let dressed = begin(request, spec, console, syscall)
        // A command that nobody hears is not executed; from here on a filter may forbid to wait.
        .and_then(|()| report.await_go())
        // The first path below is looked up in the container.
        .map(|()| end.map_or((), End::wait))
        .and_then(|()| dress(&request.process, profile, &command, syscall));
    match dressed {
        Ok(()) => command.execute(),
        Err(failure) => failure,
    }
}

/// The steps that no filter and no user forbids.
fn begin(
    request: &ExecRequest,
    spec: &Spec,
    console: Option<Sender>,
    syscall: &dyn Syscall,
) -> Result<(), Failure> {
    setsid().because("begin a session")?;
    priority::set(&request.process, spec, syscall)?;
    if let Some(console) = console {
        terminal::open((request.rows, request.columns), &console).because("terminal")?;
    }
    Ok(())
}

/// The steps up to the execution of the command.
fn dress(
    process: &Process,
    profile: Option<&LinuxSeccomp>,
    command: &Command,
    syscall: &dyn Syscall,
) -> Result<(), Failure> {
    let user = process.user();
    let quiet = process.no_new_privileges() == Some(true);
    if quiet {
        nix::sys::prctl::set_no_new_privs().because("renounce new privileges")?;
    }
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
    // As root first: the user may not see the directory, which runc allows.
    let entered = chdir(process.cwd());
    let groups = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid));
    setgroups(&groups.collect::<Vec<_>>()).because("set the additional groups")?;
    // From here on every descriptor but the standard streams closes when the command is executed.
    syscall.close_range(0).because("close descriptors")?;
    become_user(process, syscall)?;
    // Without no-new-privileges a filter needs a privilege that is about to be dropped.
    if let (false, Some(profile)) = (quiet, profile) {
        seccomp::initialize_seccomp(profile).because("seccomp")?;
    }
    if let Some(sets) = process.capabilities() {
        capabilities::drop_privileges(sets, syscall).because("capabilities")?;
    }
    if entered == Err(Errno::EPERM) || entered == Err(Errno::EACCES) {
        enter(process.cwd(), chdir(process.cwd()))?;
    } else {
        enter(process.cwd(), entered)?;
    }
    command.prepare(process.args().as_deref().unwrap_or_default(), user.uid())?;
    if let (true, Some(profile)) = (quiet, profile) {
        seccomp::initialize_seccomp(profile).because("seccomp")?;
    }
    Ok(())
}

fn enter(directory: &Path, result: nix::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| {
        let (path, reason) = (directory.display().to_string(), lookup::say(&error.into()));
        Failure::other(format!("chdir to cwd ({path:?}) set in config.json failed: {reason}"))
    })
}

/// Becomes the process's user, keeping the capabilities for the steps that follow.
fn become_user(process: &Process, syscall: &dyn Syscall) -> Result<(), Failure> {
    let user = process.user();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    nix::sys::prctl::set_keepcaps(true).because("keep capabilities")?;
    setresgid(gid, gid, gid).because("set the group")?;
    setresuid(uid, uid, uid).because("set the user")?;
    capabilities::reset_effective(syscall).because("capabilities")?;
    nix::sys::prctl::set_keepcaps(false).because("keep capabilities")
}
