//! What an attacker would try who has taken over a process in its jail, one by one.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use husk_vmm::jail;

use super::no_root;

/// Runs `body` in a process of its own and fails with what it says, if that is anything.
pub(super) fn apart(body: impl FnOnce() -> Vec<String>) {
    let (mut theirs, ours) = io::pipe().unwrap();
    // The jail closes all but the first four descriptors.
    // SAFETY: the child goes on in this thread alone, and ends without coming back.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: the number is taken from nothing that is used below.
            unsafe { libc::dup2(ours.as_raw_fd(), 3) };
            let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body))
                .unwrap_or_else(|_| vec!["panic".to_owned()]);
            let text = format!("done\n{}", said.join("\n"));
            // SAFETY: the text is as long as it says; then the process ends at once.
            unsafe {
                libc::write(3, text.as_ptr().cast(), text.len());
                libc::_exit(0);
            }
        }
        child => {
            assert!(child > 0);
            drop(ours);
            let text = io::read_to_string(&mut theirs).unwrap();
            // SAFETY: our child, and no status is asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            assert_eq!(text, "done\n");
        }
    }
}

struct Attempts(Vec<String>);

impl Attempts {
    fn refused(&mut self, what: &str, result: libc::c_long) {
        if result >= 0 {
            self.0.push(format!("{what}: done"));
        }
    }

    fn not_opened(&mut self, path: &str) {
        if File::open(path).is_ok() {
            self.0.push(format!("open {path}: done"));
        }
    }

    /// What is to fail in both jails.
    fn common(&mut self, parent: libc::pid_t) {
        for path in
            ["/etc/passwd", "/proc/self/status", "/dev/null", "/sys/kernel", "../etc/passwd"]
        {
            self.not_opened(path);
        }
        if fs::write("/new", "").is_ok() {
            self.0.push("write to the root: done".to_owned());
        }
        // SAFETY: terminated texts, numbers, or null where the kernel refuses before it reads.
        unsafe {
            let none = std::ptr::null::<libc::c_char>();
            let root = c"/".as_ptr();
            self.refused("ptrace", libc::ptrace(libc::PTRACE_ATTACH, parent, 0, 0));
            let flags = libc::MS_REMOUNT | libc::MS_BIND;
            self.refused("remount", libc::mount(none, root, none, flags, none.cast()).into());
            let tmpfs = c"tmpfs".as_ptr();
            self.refused("mount", libc::mount(tmpfs, root, tmpfs, 0, none.cast()).into());
            self.refused("fsopen", libc::syscall(libc::SYS_fsopen, tmpfs, 0));
            for (name, flag) in [
                ("mount", libc::CLONE_NEWNS),
                ("PID", libc::CLONE_NEWPID),
                ("network", libc::CLONE_NEWNET),
                ("UTS", libc::CLONE_NEWUTS),
            ] {
                self.refused(&format!("new {name} namespace"), libc::unshare(flag).into());
            }
            self.refused("set the host's name", libc::sethostname(root, 1).into());
            self.refused("reboot", libc::reboot(libc::RB_DISABLE_CAD).into());
            self.refused(
                "exec",
                libc::execve(c"/bin/sh".as_ptr(), [none].as_ptr(), [none].as_ptr()).into(),
            );
            // PERF_TYPE_HARDWARE of another process; a BPF program without instructions.
            let nothing = [0_u64; 16];
            let perf = libc::SYS_perf_event_open;
            self.refused("perf", libc::syscall(perf, nothing.as_ptr(), parent, -1, -1, 0));
            self.refused("bpf", libc::syscall(libc::SYS_bpf, 5, nothing.as_ptr(), 128));
            self.refused("raw socket", libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).into());
            self.refused("get root's rights back", libc::prctl(libc::PR_SET_SECUREBITS, 0).into());
            let handle = [0_u64; 4];
            let by_handle = libc::SYS_open_by_handle_at;
            self.refused("open by handle", libc::syscall(by_handle, 0, handle.as_ptr(), 0));
        }
    }
}

#[test]
fn in_the_machine() {
    if no_root() {
        return;
    }
    // SAFETY: takes nothing.
    let parent = unsafe { libc::getpid() };
    apart(|| {
        jail::enter_machine(&[]).unwrap();
        let mut attempts = Attempts(Vec::new());
        attempts.common(parent);
        // SAFETY: terminated texts and numbers; signal 0 does nothing but ask.
        unsafe {
            attempts.refused("signal its parent", libc::kill(parent, 0).into());
            attempts.refused("signal init", libc::kill(1, 0).into());
            attempts.refused("become root", libc::setresuid(0, 0, 0).into());
            attempts.refused("become root's group", libc::setresgid(0, 0, 0).into());
            attempts.refused("chroot", libc::chroot(c"/".as_ptr()).into());
            attempts.refused("new user namespace", libc::unshare(libc::CLONE_NEWUSER).into());
        }
        attempts.0
    });
}

#[test]
fn in_the_file_server() {
    if no_root() {
        return;
    }
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("secret"), "").unwrap();
    let shared = outer.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("own"), "").unwrap();
    std::os::unix::fs::symlink(outer.path().join("secret"), shared.join("away")).unwrap();
    std::os::unix::fs::symlink("../secret", shared.join("up")).unwrap();
    // SAFETY: takes nothing.
    let parent = unsafe { libc::getpid() };
    let folder = File::open(&shared).unwrap();
    // Out of the way of the descriptor that the child answers on.
    // SAFETY: an open descriptor by number.
    let number = unsafe { libc::fcntl(folder.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) };
    apart(|| {
        // In the place of one that the jail leaves, as it would come later by a socket.
        // SAFETY: standard input is not used here.
        unsafe { libc::dup2(number, 0) };
        let jail = jail::enter_files(&[]).unwrap();
        // SAFETY: open as long as this process is.
        let folder = unsafe { BorrowedFd::borrow_raw(0) };
        let descriptors = jail.close(folder).unwrap();
        let mut attempts = Attempts(Vec::new());
        if let Err(error) = File::open("/own") {
            attempts.0.push(format!("its own file: {error}"));
        }
        fs::remove_file("/own").unwrap();
        for path in ["/away", "/up", "/../secret", "/../../../../etc/passwd"] {
            attempts.not_opened(path);
        }
        for (from, path) in [
            (folder, c"../secret"),
            (folder, c"../../../etc/passwd"),
            (descriptors.as_fd(), c"../../sys/kernel/core_pattern"),
            (descriptors.as_fd(), c"../../sysrq-trigger"),
            (descriptors.as_fd(), c"../../1/root/etc/passwd"),
            (descriptors.as_fd(), c"../../1/status"),
            (descriptors.as_fd(), c"../../../etc/passwd"),
        ] {
            // SAFETY: a terminated path and an open descriptor.
            let result = unsafe { libc::openat(from.as_raw_fd(), path.as_ptr(), libc::O_RDONLY) };
            attempts.refused(&format!("open {path:?}"), result.into());
        }
        // SAFETY: a terminated text.
        let result = unsafe { libc::chroot(c"/".as_ptr()) };
        attempts.refused("chroot", result.into());
        let writable = fs::write("/new", "").and_then(|()| fs::remove_file("/new"));
        if writable.is_err() || Path::new("/secret").exists() {
            attempts.0.push("the shared folder is not the root".to_owned());
        }
        // It may write to its root, which is the shared folder.
        fs::create_dir("/new").unwrap();
        attempts.common(parent);
        attempts.0
    });
}
