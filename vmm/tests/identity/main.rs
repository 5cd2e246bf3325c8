//! Which file a node is: the server's answers beside plain system calls on an identical copy, with so
//! few descriptors that nodes are always found anew.

#![allow(clippy::unwrap_used)] // A failed test is a panic.

#[allow(dead_code)]
#[path = "../files/client.rs"]
mod client;
mod crowd;
mod place;
mod volumes;
mod world;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use client::{Client, is_root};
use place::{PLACES, Place};
use world::World;

/// Descriptors of this process: some for the test, 256 that the server keeps for itself, and few to
/// remember nodes by.
const DESCRIPTORS: u64 = 300;

/// Serves `folder`, which has volumes in a folder of that name, in a thread with that limit of descriptors.
fn serve(folder: &Path) -> Client {
    let limit = libc::rlimit { rlim_cur: DESCRIPTORS, rlim_max: DESCRIPTORS };
    // SAFETY: `limit` is only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let folder = File::open(folder).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        husk_vmm::files::serve_one(folder.as_fd(), OwnedFd::from(theirs), Some(place::VOLUMES))
            .unwrap();
    });
    Client::on(ours)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn every_name_is_what_it_is_on_the_host() {
    if !is_root() {
        return;
    }
    let first = number("HUSK_SEED", 1);
    for kind in PLACES {
        for seed in first..first + number("HUSK_CYCLES", 3) {
            let Some(place) = Place::make(*kind) else { break };
            let client = serve(&place.share());
            println!("{kind:?}, HUSK_SEED={seed}");
            World::new(client, place, seed).run(400);
        }
    }
}
