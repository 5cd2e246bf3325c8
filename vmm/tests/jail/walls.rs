//! A host that lacks a wall.

use std::fs::File;
use std::os::fd::{BorrowedFd, IntoRawFd};

use husk_vmm::jail::{self, JailError, Landlock, Wall};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::attacks::apart;
use super::no_root;

/// From now on, as on a kernel without Landlock.
fn forget_landlock() {
    let filter = SeccompFilter::new(
        [(libc::SYS_landlock_create_ruleset, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    );
    let program = BpfProgram::try_from(filter.unwrap()).unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

fn said(result: Result<impl std::fmt::Debug, JailError>, wanted: &str) -> Vec<String> {
    let said = format!("{result:?}");
    if said == wanted { Vec::new() } else { vec![said] }
}

#[test]
fn a_host_without_landlock_is_refused_unless_accepted() {
    if no_root() {
        return;
    }
    apart(|| {
        forget_landlock();
        said(jail::enter_machine(&[]), &format!("{:?}", Err::<Landlock, _>(JailError::NoLandlock)))
    });
    apart(|| {
        forget_landlock();
        said(jail::enter_machine(&[Wall::Landlock]), "Ok(Missing)")
    });
    apart(|| {
        forget_landlock();
        // The jail closes all descriptors but the first few.
        let folder = File::open("/").unwrap().into_raw_fd();
        // SAFETY: an open descriptor by number; standard input is not used here.
        unsafe { libc::dup2(folder, 0) };
        let jail = jail::enter_files(&[]).unwrap();
        // SAFETY: open as long as this process is.
        let folder = unsafe { BorrowedFd::borrow_raw(0) };
        said(jail.close(folder), &format!("{:?}", Err::<(), _>(JailError::NoLandlock)))
    });
}
