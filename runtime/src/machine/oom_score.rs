//! How soon the host's OOM killer takes a process (proc(5), `oom_score_adj`).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

use nix::unistd::Pid;

/// The score adjustment of one process, held by descriptor: a later process of the same number is
/// never changed.
#[derive(Debug)]
pub struct OomScore(File);

impl OomScore {
    /// That of the process `pid`, which has not been waited for.
    pub(super) fn of(pid: Pid) -> io::Result<Self> {
        let path = format!("/proc/{pid}/oom_score_adj");
        OpenOptions::new().write(true).open(path).map(Self)
    }

    /// Sets the adjustment, from -1000 (never) to 1000 (first). `ESRCH` once the process has ended.
    pub fn set(&self, score: i32) -> io::Result<()> {
        (&self.0).write_all(score.to_string().as_bytes())
    }
}

/// The adjustment of this process, which those that it starts have at first.
pub fn own_oom_score() -> i32 {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_what_it_is_given_and_its_heir_has_not() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let score = OomScore::of(pid).unwrap();
        // More needs no right; less would.
        let more = (own_oom_score() + 7).min(1000);
        score.set(more).unwrap();
        let path = format!("/proc/{pid}/oom_score_adj");
        assert_eq!(std::fs::read_to_string(path).unwrap().trim(), more.to_string());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(score.set(more).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
