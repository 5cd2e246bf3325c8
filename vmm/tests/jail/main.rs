//! The jails from outside and from inside: the program itself, looked at through /proc, and a process
//! in the same jail that tries what an attacker would. Without root each test says that it skipped.

// Everything here is a test, helpers included.
#![allow(clippy::unwrap_used)]

mod attacks;
mod host;
mod outside;
mod role;
mod rows;
mod walls;

fn no_root() -> bool {
    // SAFETY: takes nothing.
    let no_root = unsafe { libc::geteuid() } != 0;
    if no_root {
        husk_skip::skipped("the jail needs root");
    }
    no_root
}
