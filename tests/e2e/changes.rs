//! Volumes that the host changes while containers have them.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Child;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{PROBE, Run, Runtime, finish, spawn};
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until_true};

use crate::mounts::bind;
use crate::{Case, within};

pub const CASES: &[Case] = &[("changes::seen", seen), ("changes::heard", heard)];

/// A process that runs, and an exec, see what the host does to a volume.
fn seen(runtime: Runtime) -> Result<()> {
    let shared = within::SHARED.of(runtime)?;
    let here = tempfile::tempdir_in(shared.volume.path())?;
    fs::write(here.path().join("value"), "old\n")?;
    fs::write(here.path().join("kept"), "")?;
    fs::set_permissions(here.path().join("kept"), Permissions::from_mode(0o600))?;
    let name = here.path().file_name().unwrap_or_default().to_string_lossy();
    let line = format!(
        "cd /volume/{name}; cat value; stat -c %a kept; touch ready; \
         for i in $(seq 100); do [ -e go ] && break; sleep 0.2; done; cat value; stat -c %a kept"
    );
    let words = ["task", "exec", "--exec-id", "host-changes", &shared.task.id, "sh", "-c", &line];
    let child = spawn(&words)?;
    until_true("it is ready", PATIENCE, || Ok(here.path().join("ready").exists()))?;
    // As a kubelet replaces a ConfigMap: a new file under the old name.
    fs::write(here.path().join("next"), "new and longer\n")?;
    fs::rename(here.path().join("next"), here.path().join("value"))?;
    fs::set_permissions(here.path().join("kept"), Permissions::from_mode(0o640))?;
    let fresh = format!("cd /volume/{name}; cat value; stat -c %a kept");
    let text = shared.task.shell(&fresh)?;
    ensure!(text == "new and longer\n640", "an exec sees {text}");
    fs::write(here.path().join("go"), "")?;
    let text = finish(child)?.text(0)?;
    ensure!(text == "old\n600\nnew and longer\n640", "{text}");
    Ok(())
}

/// Programs that watch a projected volume or a mounted file hear what the host does to it.
fn heard(runtime: Runtime) -> Result<()> {
    let here = tempfile::tempdir()?;
    let settings = here.path().join("volumes/kubernetes.io~configmap/settings");
    let project = |number: u32| -> Result<()> {
        let folder = settings.join(format!("..{number}"));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("value"), format!("value-{number}\n"))?;
        symlink(format!("..{number}"), settings.join("..data_tmp"))?;
        Ok(fs::rename(settings.join("..data_tmp"), settings.join("..data"))?)
    };
    project(1)?;
    symlink("..data/value", settings.join("value"))?;
    let given = here.path().join("given");
    fs::write(&given, "old\n")?;
    let run = Run::new(runtime, &["sleep", "100000"])
        .flag("--mount")
        .flag(bind(&settings, "/settings", "rbind:ro"))
        .flag("--mount")
        .flag(bind(&given, "/given", "rbind:ro"));
    let task = Task::start(run.with_probe()?)?;
    let watch = |name: &str, words: [&str; 3]| -> Result<Child> {
        let fixed = ["task", "exec", "--exec-id", name, &task.id, PROBE, "events"];
        let mut child = spawn(&[&fixed[..], &words].concat())?;
        drop(child.stdin.take());
        let out = child.stdout.as_mut().context("no stdout")?;
        std::io::Read::read_exact(out, &mut [0; 6])?;
        Ok(child)
    };
    let projected = watch("projected", ["/settings", "40000200..1", "/settings/value"])?;
    project(2)?;
    fs::remove_dir_all(settings.join("..1"))?;
    let text = finish(projected)?.text(0)?;
    let wanted = "40000100..2 100..data_tmp 40..data_tmp 80..data 40000200..1 value-1 value-2";
    ensure!(text == wanted, "{text}");
    ensure!(!settings.join("..1").exists() && settings.join("..2/value").exists());
    let file = watch("file", ["/given", "8", "/given"])?;
    fs::write(&given, "new\n")?;
    let text = finish(file)?.text(0)?;
    ensure!(text == "2 8 old new", "{text}");
    Ok(())
}
