//! A container that runs in the background, and what is asked of its task.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use serde_json::Value;

use crate::client::{end_task, remove_container, task_is};
use crate::containerd::{Finished, Run, ctr, finish, spawn, upper_folder};
use crate::wait::{PATIENCE, until_true};

/// A running container; dropping it ends and removes it.
#[derive(Debug)]
pub struct Task {
    /// The container's id.
    pub id: String,
    execs: AtomicU32,
}

impl Task {
    /// Starts `run` in the background.
    pub fn start(run: Run) -> Result<Self> {
        let run = run.keep().flag("--detach");
        let task = Self::running(&run.id);
        run.finish()?.text(0)?;
        Ok(task)
    }

    /// One that runs already.
    pub fn running(id: &str) -> Self {
        Self { id: id.to_owned(), execs: AtomicU32::new(0) }
    }

    /// Runs a command in it to its end.
    pub fn exec(&self, command: &[&str]) -> Result<Finished> {
        self.exec_with(&[], command)
    }

    /// The same with flags of `ctr task exec`.
    pub fn exec_with(&self, flags: &[&str], command: &[&str]) -> Result<Finished> {
        let name = format!("e{}", self.execs.fetch_add(1, Ordering::Relaxed));
        let fixed = ["task", "exec", "--exec-id", &name];
        let mut child = spawn(&[&fixed[..], flags, &[&self.id], command].concat())?;
        drop(child.stdin.take());
        finish(child)
    }

    /// The folder on the host that holds what the container changed in its root file system.
    pub fn upper_folder(&self) -> Result<std::path::PathBuf> {
        upper_folder(&self.id)
    }

    /// Runs a shell line in it; its output if it ends with 0.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.exec(&["sh", "-c", line])?.text(0)
    }

    /// A call of `ctr task` that must succeed.
    pub fn call(&self, verb: &str) -> Result<String> {
        ctr(&["task", verb, &self.id])
    }

    /// What the container uses.
    pub fn metrics(&self) -> Result<Value> {
        Ok(serde_json::from_str(&ctr(&["task", "metrics", "--format", "json", &self.id])?)?)
    }

    /// Waits until containerd says so of it.
    pub fn becomes(&self, status: &str) -> Result<()> {
        let what = format!("{} becomes {status}", self.id);
        until_true(&what, PATIENCE, || Ok(task_is(&self.id, status)))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // It may have ended, or never have begun.
        let _ = end_task(&self.id);
        let _ = remove_container(&self.id);
    }
}
