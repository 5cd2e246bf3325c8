//! Networks as engines lay them: a namespace, and CNI plugins called as the specification says.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const PLUGINS: &str = "/usr/lib/cni";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Held while a plugin runs: two that make the same iptables chain at once fail with "File exists".
static PLUGIN: Mutex<()> = Mutex::new(());

/// A network namespace with what plugins have laid into it; dropping takes both away.
#[derive(Debug)]
pub struct Network {
    /// Its name.
    pub name: String,
    added: Mutex<Vec<(String, Vec<Value>)>>,
}

impl Network {
    /// An empty one.
    pub fn new() -> Result<Self> {
        let name = format!("net-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        Ok(Self { name, added: Mutex::default() })
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// The flag of `ctr run` that puts a container there.
    pub fn flag(&self) -> String {
        format!("network:{}", self.path())
    }

    /// Has a chain of plugins lay an interface; the last one's result.
    pub fn lay(&self, interface: &str, chain: Value) -> Result<Value> {
        let plugins = chain.as_array().cloned().unwrap_or_else(|| vec![chain]);
        // Also what a chain that fails half-way has laid.
        let added = (interface.to_owned(), plugins.clone());
        self.added.lock().unwrap_or_else(PoisonError::into_inner).push(added);
        let mut result = Value::Null;
        for plugin in &plugins {
            result = self.call("ADD", interface, plugin, &result)?;
        }
        Ok(result)
    }

    /// `ip` in the namespace.
    pub fn ip(&self, words: &[&str]) -> Result<String> {
        ip(&[&["-n", &self.name], words].concat())
    }

    /// Queueing disciplines of the namespace that are not the kernel's own.
    pub fn disciplines(&self) -> Result<String> {
        let listed = run("tc", &["-n", &self.name, "qdisc", "show"])?;
        let lines = listed.lines().filter(|line| !line.contains("noqueue"));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    fn call(&self, what: &str, interface: &str, plugin: &Value, before: &Value) -> Result<Value> {
        let mut plugin = plugin.clone();
        plugin["cniVersion"] = json!("0.4.0");
        if !plugin["name"].is_string() {
            plugin["name"] = json!(format!("test-{}-{interface}", self.name));
        }
        if !before.is_null() {
            plugin["prevResult"] = before.clone();
        }
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let _alone = PLUGIN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = Command::new(format!("{PLUGINS}/{kind}"))
            .env("CNI_COMMAND", what)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("plugin {kind}"))?;
        child.stdin.take().context("no stdin")?.write_all(plugin.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "plugin {kind}: {text}");
        if text.trim().is_empty() {
            return Ok(before.clone());
        }
        serde_json::from_str(&text).with_context(|| format!("plugin {kind}: {text}"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let added = std::mem::take(&mut *self.added.lock().unwrap_or_else(PoisonError::into_inner));
        for (interface, plugins) in added.iter().rev() {
            for plugin in plugins.iter().rev() {
                let _ = self.call("DEL", interface, plugin, &Value::Null);
            }
        }
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// Runs `ip`, which must succeed.
pub fn ip(words: &[&str]) -> Result<String> {
    run("ip", words)
}

/// Runs a command, which must succeed; what it prints.
pub fn run(program: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program).args(words).output().with_context(|| program.to_owned())?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {errors}", words.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
