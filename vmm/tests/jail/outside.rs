//! The program in its jail, as root sees it through /proc.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use husk_control::{CONTROL_FD, socket_pair};

use super::no_root;

struct Role {
    child: Child,
    control: Option<OwnedFd>,
}

impl Role {
    /// Starts the role with a descriptor too many, and waits until it is in its jail.
    fn start(name: &str) -> Self {
        let (ours, theirs) = socket_pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk-vmm"));
        command.arg(name).env("SECRET", "1").stdin(Stdio::null());
        let descriptor = theirs.as_raw_fd();
        // SAFETY: dup2 only, which is async-signal-safe; the descriptor is open until then.
        unsafe {
            command.pre_exec(move || {
                for number in [9, CONTROL_FD] {
                    if libc::dup2(descriptor, number) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let role = Self { child, control: Some(ours) };
        let deadline = Instant::now() + Duration::from_secs(20);
        // The last step of both.
        while role.status("NoNewPrivs") != "1" {
            assert!(Instant::now() < deadline, "never in its jail");
            std::thread::sleep(Duration::from_millis(5));
        }
        role
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    fn status(&self, field: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
        line.unwrap().trim().to_owned()
    }

    fn shares(&self, namespace: &str) -> bool {
        let own = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        fs::read_link(self.proc(&format!("ns/{namespace}"))).unwrap() == own
    }

    /// What it has open beside what it was given, as /proc calls it.
    fn own_descriptors(&self) -> Vec<String> {
        let list = fs::read_dir(self.proc("fd")).unwrap().map(|entry| entry.unwrap());
        let own = list.filter(|entry| {
            entry.file_name().to_str().unwrap().parse::<i32>().unwrap() > CONTROL_FD
        });
        // One may be closed meanwhile.
        own.filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| link.into_os_string().into_string().unwrap())
            .collect()
    }

    fn check_common(&self) {
        for namespace in ["mnt", "ipc", "uts", "cgroup"] {
            assert!(!self.shares(namespace), "{namespace}");
        }
        let mounts = fs::read_to_string(self.proc("mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
        assert_eq!(fs::read_dir(self.proc("root/")).unwrap().count(), 0);
        let environment = fs::read(self.proc("environ")).unwrap();
        assert!(environment.iter().all(|byte| *byte == 0), "the environment is still there");
        let limits = fs::read_to_string(self.proc("limits")).unwrap();
        let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{cores}");
        for field in ["CapInh", "CapAmb"] {
            assert_eq!(self.status(field), "0000000000000000", "{field}");
        }
    }

    fn end(mut self) {
        drop(self.control.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended already, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_machine_has_nothing() {
    if no_root() {
        return;
    }
    let role = Role::start("machine");
    role.check_common();
    // Its event loop, and what counts and times in it.
    let own = role.own_descriptors();
    assert!(own.iter().all(|link| link.starts_with("anon_inode:")), "{own:?}");
    assert!(!role.shares("user"));
    assert!(role.shares("net"), "containerd finds the pod's network by it");
    for field in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(role.status(field), "0000000000000000", "{field}");
    }
    let user = 1_900_000_000 + role.child.id();
    assert_eq!(role.status("Uid"), format!("{user}\t{user}\t{user}\t{user}"));
    assert_eq!(role.status("Gid"), format!("{user}\t{user}\t{user}\t{user}"));
    assert_eq!(role.status("Groups"), "");
    role.end();
}

#[test]
fn a_file_server_has_rights_over_files_only() {
    if no_root() {
        return;
    }
    let role = Role::start("files");
    role.check_common();
    let own = role.own_descriptors();
    assert!(own.len() == 1 && own[0].ends_with("/fd"), "its own `/proc/self/fd`: {own:?}");
    assert!(!role.shares("net"));
    // 0, 1, 3, 4, 6, 7, 9 and 18 (both until the folder has come; 9 longer if the sandbox has it), 27 and 31. 9 goes with the folder unless the sandbox has it.
    for field in ["CapPrm", "CapEff"] {
        assert_eq!(role.status(field), "00000000880402db", "{field}");
    }
    assert_eq!(role.status("CapBnd"), "00000000880000db");
    role.end();
}
