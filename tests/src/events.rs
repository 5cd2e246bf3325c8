//! containerd's events.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::containerd::{ctr, spawn};
use crate::wait::{PATIENCE, until_true};

/// containerd's events as they come.
#[derive(Debug)]
pub struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    /// Follows from now on.
    pub fn follow() -> Result<Self> {
        let mut child = spawn(&["events"])?;
        let out = child.stdout.take().context("no stdout")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        // The subscription has no answer; an event of our own shows that it stands.
        let mark = format!("mark-{}", std::process::id());
        until_true("events come", PATIENCE, || {
            let _ = ctr(&["namespaces", "create", &mark]);
            let _ = ctr(&["namespaces", "remove", &mark]);
            Ok(lines.recv_timeout(Duration::from_millis(500)).is_ok())
        })?;
        Ok(Self { child, lines })
    }

    /// The topics of the container's events up to the last one wanted.
    pub fn until(&mut self, id: &str, last: &str) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        let name = format!("\"container_id\":\"{id}\"");
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let Ok(line) = line else { bail!("no {last} after {seen:?}") };
            if !line.contains(&name) {
                continue;
            }
            let topic = line.split_whitespace().find(|word| word.starts_with("/tasks/"));
            seen.extend(topic.map(str::to_owned));
            if topic == Some(last) {
                return Ok(seen);
            }
        }
    }

    /// The topics of the container's events that come within `patience`.
    pub fn within(&mut self, id: &str, patience: Duration) -> Vec<String> {
        let until = Instant::now() + patience;
        let name = format!("\"container_id\":\"{id}\"");
        let mut seen = Vec::new();
        while let Ok(line) =
            self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            let topic = line.split_whitespace().find(|word| word.starts_with("/tasks/"));
            seen.extend(topic.filter(|_| line.contains(&name)).map(str::to_owned));
        }
        seen
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
