//! Attacks, by what they are after.

mod code;
mod files;
mod kernel;
mod processes;
mod sockets;

use super::host::Host;
use super::role::{Role, Row, enter, out_of_the_way, place, try_all};
use super::{attacks::apart, no_root};

/// The shim starts both roles in a PID namespace, where there are no other processes to attack. Here it
/// is left out, so that the other walls stand alone.
const ROWS: &[&[Row]] = &[files::ROWS, sockets::ROWS, processes::ROWS, kernel::ROWS, code::ROWS];

fn every_attack_fails(role: Role) {
    if no_root() {
        return;
    }
    let mut host = Host::new();
    let folder = out_of_the_way(&host.shared());
    let program = out_of_the_way(&std::fs::File::open("/bin/true").unwrap());
    let begin = |host: &mut Host| {
        place(&folder, &program);
        enter(role, host);
    };
    assert_eq!(try_all(role, &[files::OWN], &mut host, begin), [""; 0]);
    // Entering takes some milliseconds: once for all the others.
    apart(|| {
        begin(&mut host);
        let wrong = try_all(role, ROWS, &mut host, |_| ());
        std::mem::forget(host);
        wrong
    });
}

#[test]
fn of_the_machine() {
    every_attack_fails(Role::Machine);
}

#[test]
fn of_the_file_server() {
    every_attack_fails(Role::Files);
}
