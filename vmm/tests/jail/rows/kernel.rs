//! Mounts, namespaces, rights and other doors of the kernel's.

use libc::{EFAULT, EINVAL, ENOKEY, ENOSYS, EPERM, c_int, c_long};

use crate::role::{End, FOLDER, Row, Walls, call};

const HERE: u64 = libc::AT_FDCWD as u64;
const ROOT: *const libc::c_char = c"/".as_ptr();
const TMPFS: *const libc::c_char = c"tmpfs".as_ptr();

const fn refused(name: &'static str) -> Walls {
    (End::Refused(&[EPERM]), End::Named(name))
}

/// A jail of no kernel setting refuses these.
const fn by_filter(name: &'static str) -> Walls {
    (End::FilterOnly, End::Named(name))
}

/// The same, or a kernel without such a call.
const fn refused_or_missing(name: &'static str) -> Walls {
    (End::Refused(&[EPERM, ENOSYS]), End::Named(name))
}

fn flags(flags: impl Into<i64>) -> u64 {
    flags.into().cast_unsigned()
}

fn mount(source: *const libc::c_char, kind: *const libc::c_char, how: u64) -> c_long {
    call(libc::SYS_mount, [source as u64, ROOT as u64, kind as u64, how, 0])
}

fn namespaces(kinds: c_int) -> c_long {
    call(libc::SYS_unshare, [flags(kinds)])
}

/// `capset` of `CAP_SYS_ADMIN` and all others.
fn all_rights() -> c_long {
    let header = [0x2008_0522_u32, 0];
    let sets = [u32::MAX; 6];
    call(libc::SYS_capset, [header.as_ptr() as u64, sets.as_ptr() as u64])
}

fn control(option: c_int, value: u64) -> c_long {
    call(libc::SYS_prctl, [flags(option), value, 0, 0, 0])
}

pub const ROWS: &[Row] = &[
    Row::both("mount", refused("mount"), |_| mount(TMPFS, TMPFS, 0)),
    Row::both("bind", refused("mount"), |_| mount(ROOT, TMPFS, libc::MS_BIND)),
    Row::both("make the root writable", refused("mount"), |_| {
        mount(ROOT, TMPFS, libc::MS_REMOUNT | libc::MS_BIND)
    }),
    Row::both("umount", refused("umount2"), |_| call(libc::SYS_umount2, [ROOT as u64, 2])),
    Row::both("fsopen", refused("fsopen"), |_| call(libc::SYS_fsopen, [TMPFS as u64, 0])),
    Row::both("fspick", refused("fspick"), |_| call(libc::SYS_fspick, [HERE, ROOT as u64, 0])),
    Row::both("fsmount", refused("fsmount"), |_| call(libc::SYS_fsmount, [0, 0, 0])),
    // OPEN_TREE_CLONE.
    Row::both("open_tree", refused("open_tree"), |_| {
        call(libc::SYS_open_tree, [HERE, ROOT as u64, 1])
    }),
    // MOVE_MOUNT_F_EMPTY_PATH.
    Row::both("move_mount", refused("move_mount"), |_| {
        let empty = c"".as_ptr() as u64;
        call(libc::SYS_move_mount, [flags(FOLDER), empty, HERE, ROOT as u64, 4])
    }),
    Row::both("mount_setattr", refused("mount_setattr"), |_| {
        // struct mount_attr: MOUNT_ATTR_RDONLY is cleared.
        let attributes = [0_u64, 1, 0, 0];
        let at = attributes.as_ptr() as u64;
        call(libc::SYS_mount_setattr, [HERE, ROOT as u64, 0, at, 32])
    }),
    Row::both("pivot_root", refused("pivot_root"), |_| {
        call(libc::SYS_pivot_root, [ROOT as u64, ROOT as u64])
    }),
    // The file server's first thread may call it, but has lost the right.
    Row::both("chroot", refused("chroot"), |_| call(libc::SYS_chroot, [ROOT as u64])),
    Row::both("unshare: mounts", refused("unshare"), |_| namespaces(libc::CLONE_NEWNS)),
    Row::both("unshare: processes", refused("unshare"), |_| namespaces(libc::CLONE_NEWPID)),
    Row::both("unshare: network", refused("unshare"), |_| namespaces(libc::CLONE_NEWNET)),
    Row::both("unshare: users", refused("unshare"), |_| namespaces(libc::CLONE_NEWUSER)),
    Row::both("unshare: users and mounts", refused("unshare"), |_| {
        namespaces(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
    }),
    Row::both("clone: users", refused("clone"), |_| {
        call(libc::SYS_clone, [flags(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0, 0])
    }),
    Row::both("clone: mounts", refused("clone"), |_| {
        call(libc::SYS_clone, [flags(libc::CLONE_NEWNS | libc::SIGCHLD), 0, 0, 0, 0])
    }),
    Row::both("clone: a process", by_filter("clone"), |_| {
        call(libc::SYS_clone, [flags(libc::SIGCHLD), 0, 0, 0, 0])
    }),
    Row::both("fork", by_filter("fork"), |_| call(libc::SYS_fork, [])),
    Row::both(
        "clone3: users",
        // To the filter as if there were no such call.
        (End::Refused(&[EPERM]), End::Refused(&[ENOSYS])),
        |_| {
            // struct clone_args of its first size: flags, three addresses, the signal at the end.
            let mut arguments = [0_u64; 8];
            arguments[0] = flags(libc::CLONE_NEWUSER);
            arguments[4] = flags(libc::SIGCHLD);
            call(libc::SYS_clone3, [arguments.as_ptr() as u64, 64])
        },
    ),
    Row::both(
        "setns",
        // The folder is no namespace, nor is anything else that it could open.
        (End::Refused(&[EINVAL]), End::Named("setns")),
        |_| call(libc::SYS_setns, [flags(FOLDER), 0]),
    ),
    Row::each(
        "setuid",
        (End::Refused(&[EINVAL]), End::Named("setuid")),
        by_filter("setuid"),
        |_| call(libc::SYS_setuid, [0]),
    ),
    Row::each(
        "setresgid",
        (End::Refused(&[EINVAL]), End::Named("setresgid")),
        by_filter("setresgid"),
        |_| call(libc::SYS_setresgid, [0, 0, 0]),
    ),
    Row::each("setgroups", refused("setgroups"), by_filter("setgroups"), |_| {
        call(libc::SYS_setgroups, [0, 0])
    }),
    // The file server drops rights for a write, and so may call it.
    Row::each(
        "capset of all",
        refused("capset"),
        (End::Refused(&[EPERM]), End::Refused(&[EPERM])),
        |_| all_rights(),
    ),
    Row::both("prctl: keep rights", refused("prctl"), |_| control(libc::PR_SET_SECUREBITS, 0)),
    Row::both("prctl: ambient rights", refused("prctl"), |_| {
        // CAP_SYS_ADMIN.
        control(libc::PR_CAP_AMBIENT, flags(libc::PR_CAP_AMBIENT_RAISE) | 21 << 32);
        call(libc::SYS_prctl, [flags(libc::PR_CAP_AMBIENT), 2, 21, 0, 0])
    }),
    Row::both(
        "prctl: new privileges again",
        (End::Refused(&[EINVAL]), End::Named("prctl")),
        |_| control(libc::PR_SET_NO_NEW_PRIVS, 0),
    ),
    Row::both("prctl: dumpable again", by_filter("prctl"), |_| control(libc::PR_SET_DUMPABLE, 1)),
    Row::both("prctl: where its arguments are", by_filter("prctl"), |_| {
        control(libc::PR_SET_MM, flags(libc::PR_SET_MM_ARG_START))
    }),
    Row::both("another handler of SIGSYS", by_filter("rt_sigaction"), |_| {
        let action = [0_u64; 4];
        let signal = flags(libc::SIGSYS);
        call(libc::SYS_rt_sigaction, [signal, action.as_ptr() as u64, 0, 8])
    }),
    // BPF_PROG_LOAD of a kprobe; BPF_PROG_GET_NEXT_ID.
    Row::both("bpf: load", refused("bpf"), |_| {
        // `r0 = 0; exit`.
        let code = [0xb7_u64, 0x95];
        let mut attributes = [0_u64; 16];
        attributes[0] = 2 | 2 << 32;
        attributes[1] = code.as_ptr() as u64;
        attributes[2] = c"GPL".as_ptr() as u64;
        call(libc::SYS_bpf, [5, attributes.as_ptr() as u64, 128])
    }),
    Row::both("bpf: others' programs", refused("bpf"), |_| {
        let attributes = [0_u64; 2];
        call(libc::SYS_bpf, [11, attributes.as_ptr() as u64, 16])
    }),
    Row::both("add_key", by_filter("add_key"), |_| {
        let (kind, name) = (c"user".as_ptr() as u64, c"husk".as_ptr() as u64);
        // KEY_SPEC_PROCESS_KEYRING.
        call(libc::SYS_add_key, [kind, name, name, 4, flags(-2)])
    }),
    Row::both("request_key", by_filter("request_key"), |_| {
        let (kind, name) = (c"user".as_ptr() as u64, c"husk".as_ptr() as u64);
        call(libc::SYS_request_key, [kind, name, 0, 0])
    }),
    // KEYCTL_SEARCH in KEY_SPEC_SESSION_KEYRING.
    Row::both(
        "a key of the session it was started from",
        (End::Refused(&[ENOKEY, ENOSYS, EPERM]), End::Named("keyctl")),
        |host| {
            let (kind, name) = (c"user".as_ptr() as u64, host.key.as_ptr() as u64);
            call(libc::SYS_keyctl, [10, flags(-3), kind, name, 0])
        },
    ),
    // KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING.
    Row::both("keyctl", by_filter("keyctl"), |_| call(libc::SYS_keyctl, [0, flags(-3), 0])),
    Row::both("io_uring_setup", by_filter("io_uring_setup"), |_| {
        let parameters = [0_u64; 15];
        call(libc::SYS_io_uring_setup, [1, parameters.as_ptr() as u64])
    }),
    // UFFD_USER_MODE_ONLY, which needs no right; then without.
    Row::both("userfaultfd", by_filter("userfaultfd"), |_| call(libc::SYS_userfaultfd, [1])),
    Row::both("userfaultfd of the kernel's faults", by_filter("userfaultfd"), |_| {
        call(libc::SYS_userfaultfd, [0])
    }),
    Row::both("sethostname", refused("sethostname"), |_| {
        call(libc::SYS_sethostname, [ROOT as u64, 1])
    }),
    // LINUX_REBOOT_CMD_CAD_OFF, which would be the least harm.
    Row::both("reboot", refused("reboot"), |_| {
        call(libc::SYS_reboot, [0xfee1_dead, 672_274_793, 0, 0])
    }),
    Row::both("init_module", refused_or_missing("init_module"), |_| {
        call(libc::SYS_init_module, [0, 0, ROOT as u64])
    }),
    Row::both("kexec_load", refused_or_missing("kexec_load"), |_| {
        call(libc::SYS_kexec_load, [0, 0, 0, 0])
    }),
    Row::both("iopl", refused_or_missing("iopl"), |_| call(libc::SYS_iopl, [3])),
    Row::both("syslog", refused("syslog"), |_| call(libc::SYS_syslog, [5, 0, 0])),
    Row::both("swapoff", refused("swapoff"), |_| call(libc::SYS_swapoff, [ROOT as u64])),
    Row::both(
        "set the clock",
        (End::Refused(&[EPERM, EFAULT]), End::Named("clock_settime")),
        |_| {
            let time = [0_u64; 2];
            call(libc::SYS_clock_settime, [0, time.as_ptr() as u64])
        },
    ),
];
