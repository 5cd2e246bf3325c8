//! StartSandbox: what the host alone knows is set in the guest.
//!
//! A field that is empty or zero leaves things as they are.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use husk_agent_protocols::{SHARE_PATH, SHARED_MEMORY_PATH};
use nix::mount::{MsFlags, mount};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_settime};

use crate::init::calls;
use crate::init::mounts::{self, MountError};
use crate::network::{Network, Refused, State, loopback_up};

/// As large as engines make it.
const DEFAULT_SHARED_MEMORY: u64 = 64 << 20;

/// What the host says of the sandbox.
#[derive(Debug, Default)]
pub struct Setup {
    /// The sandbox's name, which is also that of its own container in a pod.
    pub name: String,
    /// The guest's host name.
    pub hostname: String,
    /// Nanoseconds since the epoch.
    pub clock: i64,
    /// For the random pool.
    pub entropy: Vec<u8>,
    /// The virtio-fs tag of the share.
    pub share: String,
    /// The share's attribute that tells how long the kernel may believe what it was told of it.
    pub validity: String,
    /// Kernel parameters by dotted name.
    pub parameters: HashMap<String, String>,
    /// Bytes of the memory that containers share.
    pub shared_memory: u64,
    /// What the network is to be.
    pub network: State,
}

/// Why the sandbox cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It has been started.
    #[error("the sandbox has been started already")]
    Twice,
    /// The host asks for what cannot be.
    #[error("kernel parameter {name:?}: {source}")]
    Parameter {
        /// Its dotted name.
        name: String,
        /// The refusal.
        source: io::Error,
    },
    /// A mount of the guest itself.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The refusal.
        source: io::Error,
    },
}

fn tried<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> Result<T, StartError> {
    result.map_err(|e| StartError::System { what, source: e.into() })
}

/// Sets everything up; returns what was refused of the network. `guest` is false beside a component test, whose machine is not ours.
pub fn start(setup: &Setup, guest: bool, network: &mut Network) -> Result<Refused, StartError> {
    // The clock first: files made from here on have their times by it.
    if setup.clock > 0 {
        let clock = TimeSpec::nanoseconds(setup.clock);
        tried("set the clock", clock_settime(ClockId::CLOCK_REALTIME, clock))?;
    }
    if !setup.entropy.is_empty() {
        let pool = tried("open the random pool", File::options().write(true).open("/dev/urandom"))?;
        tried("add entropy", calls::add_entropy(pool.as_fd(), &setup.entropy))?;
    }
    if guest {
        mounts::complete()?;
    }
    mounts::containers_cgroup()?;
    if !setup.hostname.is_empty() {
        tried("set the host name", nix::unistd::sethostname(&setup.hostname))?;
    }
    tried("bring the loopback device up", loopback_up())?;
    // Before the parameters, which may name interfaces.
    let refused = tried("set the network up", network.apply(setup.network.clone()))?;
    for (name, value) in &setup.parameters {
        set_parameter(name, value)
            .map_err(|source| StartError::Parameter { name: name.clone(), source })?;
    }
    if !setup.share.is_empty() {
        tried("make the share's mount point", fs::create_dir_all(SHARE_PATH))?;
        let (tag, flags) = (setup.share.as_str(), MsFlags::empty());
        let mounted = mount(Some(tag), SHARE_PATH, Some("virtiofs"), flags, None::<&str>);
        tried("mount the share", mounted)?;
    }
    tried("make the shared memory", shared_memory(setup.shared_memory))?;
    Ok(refused)
}

fn shared_memory(bytes: u64) -> io::Result<()> {
    fs::create_dir_all(SHARED_MEMORY_PATH)?;
    let size = if bytes == 0 { DEFAULT_SHARED_MEMORY } else { bytes };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let options = format!("mode=1777,size={size}");
    mount(Some("shm"), SHARED_MEMORY_PATH, Some("tmpfs"), flags, Some(options.as_str()))?;
    Ok(())
}

fn set_parameter(name: &str, value: &str) -> io::Result<()> {
    let path = parameter_path(name).ok_or(io::ErrorKind::InvalidInput)?;
    fs::write(path, value)
}

/// As sysctl(8) reads names: the first separator decides which of `.` and `/` is one.
pub fn parameter_path(name: &str) -> Option<PathBuf> {
    let swapped: String = match name.find(['.', '/']).map(|at| &name[at..=at]) {
        Some(".") => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    };
    let odd = |part: &str| part.is_empty() || part == "." || part == "..";
    if swapped.split('/').any(odd) {
        return None;
    }
    Some(Path::new("/proc/sys").join(swapped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_stay_below_proc_sys() {
        let path = |name| parameter_path(name).map(|p| p.display().to_string());
        assert_eq!(path("net.core.somaxconn").as_deref(), Some("/proc/sys/net/core/somaxconn"));
        assert_eq!(path("net/core/x.y").as_deref(), Some("/proc/sys/net/core/x.y"));
        let vlan = path("net.ipv4.conf.eth0/1.forwarding");
        assert_eq!(vlan.as_deref(), Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding"));
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "net..core", "."] {
            assert_eq!(parameter_path(bad), None, "{bad}");
        }
    }
}
