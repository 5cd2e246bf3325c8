//! The lists, and which kind of thread has which.

mod every;
mod files;
mod machine;
mod requests;

use super::Allowed;

// Running the guest comes first: it is by far the most frequent, and of its call's rules the first to be
// looked at.
pub(super) const BOOT: &[&[Allowed]] = &[
    machine::VCPU,
    every::THREAD,
    every::FIRST,
    every::STARTER,
    machine::DEVICES,
    machine::EVENTS,
    machine::BOOT,
];
// It starts the threads of vCPUs that are added.
pub(super) const EVENTS: &[&[Allowed]] =
    &[machine::VCPU, every::THREAD, every::STARTER, machine::DEVICES, machine::EVENTS];
pub(super) const VCPU: &[&[Allowed]] = &[machine::VCPU, every::THREAD, machine::DEVICES];
pub(super) const FOLDER: &[&[Allowed]] =
    &[every::THREAD, every::FIRST, every::STARTER, files::FOLDER, files::SERVER, files::VHOST_USER];
pub(super) const SERVER: &[&[Allowed]] = &[every::THREAD, files::SERVER];
pub(super) const VHOST_USER: &[&[Allowed]] =
    &[every::THREAD, every::STARTER, files::SERVER, files::VHOST_USER];
