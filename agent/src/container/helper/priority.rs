//! `process.scheduler` and `process.ioPriority` of an exec'd process; libcontainer sets an init's.

use std::io;

use libcontainer::syscall::Syscall;
use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
    Spec,
};

use crate::container::helper::report::{Because, Failure};
use crate::init::calls;

/// Sets what `process` asks for, or else what the container's init has by `spec`.
pub fn set(process: &Process, spec: &Spec, syscall: &dyn Syscall) -> Result<(), Failure> {
    let init = spec.process().as_ref();
    let own = process.io_priority().as_ref();
    if let Some(wanted) = own.or(init.and_then(|init| init.io_priority().as_ref())) {
        set_io(wanted, syscall).because("set process.ioPriority")?;
    }
    let own = process.scheduler().as_ref();
    if let Some(wanted) = own.or(init.and_then(|init| init.scheduler().as_ref())) {
        let attributes = attributes(wanted).because("set process.scheduler")?;
        calls::schedule(&attributes).because("set process.scheduler")?;
    }
    Ok(())
}

fn set_io(
    wanted: &LinuxIOPriority,
    syscall: &dyn Syscall,
) -> Result<(), libcontainer::syscall::SyscallError> {
    // `linux/ioprio.h`.
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    syscall.set_io_priority(class, wanted.priority())
}

/// `wanted` as sched_setattr(2) takes it.
fn attributes(wanted: &Scheduler) -> io::Result<libc::sched_attr> {
    // `linux/sched.h`; the C library has no name for the fourth.
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).map_err(invalid)?,
        sched_policy: policy,
        sched_flags: wanted.flags().iter().flatten().map(flag).fold(0, |all, one| all | one),
        sched_nice: wanted.nice().unwrap_or(0),
        sched_priority: u32::try_from(wanted.priority().unwrap_or(0)).map_err(invalid)?,
        sched_runtime: wanted.runtime().unwrap_or(0),
        sched_deadline: wanted.deadline().unwrap_or(0),
        sched_period: wanted.period().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_scheduler_is_read_as_the_kernel_numbers_it() {
        let flags = json!(["SCHED_FLAG_RECLAIM", "SCHED_FLAG_KEEP_POLICY"]);
        let wanted = json!({"policy": "SCHED_RR", "priority": 7, "flags": flags});
        let wanted = serde_json::from_value(wanted).expect("a scheduler");
        let read = attributes(&wanted).expect("numbers");
        assert_eq!((read.size, read.sched_policy, read.sched_priority), (48, 2, 7));
        assert_eq!((read.sched_flags, read.sched_nice), (0x0a, 0));
        let negative = json!({"policy": "SCHED_FIFO", "priority": -1});
        let negative = serde_json::from_value(negative).expect("a scheduler");
        attributes(&negative).expect_err("no such priority");
    }
}
