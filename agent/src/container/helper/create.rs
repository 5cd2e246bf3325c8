//! `container create`: has libcontainer make a container's init.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use pathrs::Root;
use pathrs::error::ErrorKind;

use crate::container::helper::CreateRequest;
use crate::container::helper::causes::Causes;
use crate::container::helper::command::Command;
use crate::container::helper::report::{Because, Failure, Report};
use crate::network::loopback_up;

/// Makes the init of the bundle in `directory`; the answer is its process id.
pub fn run(directory: &Path, report: &Report) -> Result<i32, Failure> {
    let request = fs::read(directory.join("create.json")).because("read the request")?;
    let request: CreateRequest = serde_json::from_slice(&request).because("read the request")?;
    if let Some((base, path)) = &request.early_directory {
        make_folder(base, path)?;
    }
    let causes = Causes::collect().because("collect what libcontainer logs")?;
    let command = Command::new(request.environment, request.directory, report.clone());
    let container = ContainerBuilder::new(request.id, SyscallType::default())
        .with_root_path(directory.join("state"))
        .because("libcontainer")?
        .with_console_socket(request.console)
        .with_executor(command)
        .as_init(directory)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .because("libcontainer")
        .map_err(|failure| causes.explain(failure))?;
    let pid = container.pid().ok_or_else(|| Failure::other("libcontainer tells no process"))?;
    if request.loopback {
        let namespace = File::open(format!("/proc/{pid}/ns/net")).because("network namespace")?;
        setns(namespace, CloneFlags::CLONE_NEWNET).because("network namespace")?;
        loopback_up().because("loopback device")?;
    }
    Ok(pid.as_raw())
}

/// Makes the working directory `path` below `base`. What else fails here may be right in the
/// container, and if not, entering it says so; but of a file it does not say which.
fn make_folder(base: &Path, path: &Path) -> Result<(), Failure> {
    let made = Root::open(base).and_then(|r| r.mkdir_all(path, &Permissions::from_mode(0o755)));
    match made.map_err(|error| error.kind()) {
        Err(ErrorKind::OsError(Some(libc::ENOTDIR))) => {
            Err(Failure::other(format!("mkdir {}: not a directory", path.display())))
        }
        _ => Ok(()),
    }
}
