//! What a file server calls.

use syscalls::Sysno;

use crate::seccomp::list::{Allowed, any, is, with};

/// Of the first thread, until its folder has come and after.
pub(super) const FOLDER: &[Allowed] = &[
    any(Sysno::recvmsg, "the shim's requests"),
    any(Sysno::sendmsg, "answers to the shim"),
    any(Sysno::chroot, "making the shared folder the root; the right to is gone then"),
    any(Sysno::fstat, "Landlock: whether the folder is one (newer C libraries)"),
    any(Sysno::newfstatat, "Landlock: whether the folder is one (older C libraries)"),
    any(Sysno::prlimit64, "how many descriptors there can be"),
    any(Sysno::landlock_create_ruleset, "allowing the shared folder and nothing else"),
    any(Sysno::landlock_add_rule, "allowing the shared folder and nothing else"),
    any(Sysno::landlock_restrict_self, "allowing the shared folder and nothing else"),
];

/// Of threads that serve.
pub(super) const SERVER: &[Allowed] = &[
    // The border.
    any(Sysno::recvfrom, "requests"),
    any(Sysno::sendto, "answers"),
    any(Sysno::writev, "answers"),
    any(Sysno::poll, "whether a channel is idle, so that its buffers are given back"),
    // In whose name.
    with(Sysno::unshare, &[&[is(0, libc::CLONE_FS as i64)]], "a working folder of its own"),
    any(Sysno::fchdir, "the folder of its descriptors"),
    any(Sysno::umask, "the asking process's mask, where access lists need it"),
    any(Sysno::geteuid, "whether it is root, as in the jail"),
    any(Sysno::setfsuid, "acting as the asking user"),
    any(Sysno::setfsgid, "acting as the asking group"),
    any(Sysno::capget, "which rights there are, before one is dropped for a write"),
    any(Sysno::capset, "dropping a right for a write, and getting it back"),
    with(
        Sysno::prctl,
        &[&[is(0, libc::PR_GET_SECUREBITS as i64)]],
        "whether rights stay when the user changes",
    ),
    // Names. All of them are one component, and no link is followed but those of its descriptors.
    any(Sysno::openat, "looking up, opening"),
    any(Sysno::statx, "attributes"),
    any(Sysno::inotify_init1, "whether two names are of one inode"),
    any(Sysno::inotify_add_watch, "whether two names are of one inode"),
    any(Sysno::inotify_rm_watch, "whether two names are of one inode"),
    any(Sysno::readlinkat, "reading a link"),
    any(Sysno::mkdirat, "making a folder"),
    any(Sysno::mknodat, "making a file, FIFO, socket or device"),
    any(Sysno::symlinkat, "making a symbolic link"),
    any(Sysno::linkat, "making a hard link"),
    any(Sysno::unlinkat, "removing"),
    any(Sysno::renameat2, "renaming"),
    any(Sysno::getdents64, "listing a folder"),
    // Attributes.
    any(Sysno::fchmodat, "changing a mode"),
    any(Sysno::fchownat, "changing an owner"),
    any(Sysno::utimensat, "changing times"),
    any(Sysno::truncate, "changing the size of a file that is not open"),
    any(Sysno::ftruncate, "changing the size of an open file"),
    any(Sysno::getxattr, "reading an extended attribute"),
    any(Sysno::setxattr, "setting an extended attribute"),
    any(Sysno::listxattr, "listing extended attributes"),
    any(Sysno::removexattr, "removing an extended attribute"),
    any(Sysno::fstatfs, "free space, the kind of a mount"),
    with(
        Sysno::ioctl,
        &[
            &[is(1, 0x8008_6601)],
            &[is(1, 0x4008_6602)],
            &[is(1, 0x801c_581f)],
            &[is(1, 0x401c_5820)],
        ],
        "inode flags",
    ),
    // Data.
    any(Sysno::preadv, "reading"),
    any(Sysno::pwritev, "writing"),
    any(Sysno::readv, "reading a file without positions, which the kernel makes"),
    any(Sysno::lseek, "holes of a file, the place in a listing"),
    any(Sysno::fallocate, "reserving space, punching holes"),
    any(Sysno::copy_file_range, "copying within the folder"),
    any(Sysno::fsync, "writing a file to its disk"),
    any(Sysno::fdatasync, "writing a file's data to its disk"),
    any(Sysno::syncfs, "writing a file system to its disk"),
];

/// Of vhost-user, beside serving.
pub(super) const VHOST_USER: &[Allowed] = &[
    any(Sysno::recvmsg, "the machine's requests, with its memory"),
    any(Sysno::sendmsg, "answers to them"),
    any(Sysno::accept4, "the machine's connection"),
    any(Sysno::epoll_create1, "its event loop"),
    any(Sysno::epoll_ctl, "its queues in the event loop"),
    any(Sysno::epoll_wait, "what happens next"),
    any(Sysno::eventfd2, "the end of its event loop"),
    with(Sysno::ioctl, &[&[is(1, libc::FIONBIO as i64)]], "a socket that does not block"),
];
