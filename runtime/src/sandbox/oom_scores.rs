//! The OOM score of a sandbox's processes on the host: what the init of its container would have under
//! runc; in a pod the highest among its containers, as the kernel takes the machine with all of them.
//! The pause container's, which is to be taken last of all, counts only while it is alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use slog::{Logger, debug};

use crate::lock::lock;
use crate::machine::{FileServer, Machine, own_oom_score};

/// The scores of a sandbox's containers.
pub(super) struct OomScores {
    own: String,
    /// Score of a container whose spec says nothing.
    inherited: i32,
    scores: Mutex<HashMap<String, i32>>,
    machine: Arc<Machine>,
    files: Arc<FileServer>,
    log: Logger,
}

impl OomScores {
    /// For the sandbox `own`, whose spec says `score`; set at once.
    pub(super) fn new(
        own: &str,
        score: Option<i32>,
        machine: &Arc<Machine>,
        files: &Arc<FileServer>,
        log: &Logger,
    ) -> Self {
        let inherited = own_oom_score();
        let scores = Self {
            own: own.to_owned(),
            inherited,
            scores: Mutex::new([(own.to_owned(), score.unwrap_or(inherited))].into()),
            machine: Arc::clone(machine),
            files: Arc::clone(files),
            log: log.clone(),
        };
        scores.apply();
        scores
    }

    /// A container is about to come, whose spec says `score`.
    pub(super) fn add(&self, id: &str, score: Option<i32>) {
        let score = score.unwrap_or(self.inherited);
        lock(&self.scores).insert(id.to_owned(), score);
        self.apply();
    }

    /// A container has gone. The sandbox's own stays known: its pod may be alone again.
    pub(super) fn remove(&self, id: &str) {
        if id != self.own {
            lock(&self.scores).remove(id);
            self.apply();
        }
    }

    fn apply(&self) {
        let score = highest(&lock(&self.scores), &self.own);
        for (name, set) in [
            ("machine", self.machine.set_oom_score(score)),
            ("files", self.files.set_oom_score(score)),
        ] {
            // One that has ended is not killed any more.
            if let Err(error) = set {
                debug!(self.log, "OOM score not set"; "of" => name, "error" => %error);
            }
        }
    }
}

fn highest(scores: &HashMap<String, i32>, own: &str) -> i32 {
    let members = scores.iter().filter(|(id, _)| *id != own).map(|(_, score)| *score);
    members.max().or_else(|| scores.get(own).copied()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_counts_and_the_pause_containers_only_alone() {
        let score = |scores: &[(&str, i32)]| {
            let scores = scores.iter().map(|(id, score)| ((*id).to_owned(), *score));
            highest(&scores.collect(), "pause")
        };
        assert_eq!(score(&[("pause", -998)]), -998);
        assert_eq!(score(&[("pause", 500), ("a", -997)]), -997);
        assert_eq!(score(&[("pause", -998), ("a", 2), ("b", 1000), ("c", -5)]), 1000);
    }
}
