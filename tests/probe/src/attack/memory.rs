//! All the memory there is.

use std::process::exit;

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

use super::Until;

/// Fills memory until the kernel ends it, again and again.
pub fn fill(until: &Until) {
    while until.goes_on() {
        // SAFETY: the program has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
                let mut blocks: Vec<Vec<u8>> = Vec::new();
                while until.goes_on() {
                    blocks.push(vec![0xa5; 4 << 20]);
                }
                exit(i32::from(blocks.is_empty()));
            }
            Ok(ForkResult::Parent { child }) => {
                let _ = waitpid(child, None);
            }
            Err(_) => {}
        }
    }
}
