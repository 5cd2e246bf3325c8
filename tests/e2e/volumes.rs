//! Volumes of several containers in a pod.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use husk_tests::containerd::{PROBE, Runtime, probe_path};
use husk_tests::cri::Inside;
use husk_tests::wait::{PATIENCE, until_true};

use crate::Case;
use crate::mounts::Mounted;
use crate::pods::POD;

pub const CASES: &[Case] = &[("volumes::overlap", overlap)];

/// A container has a folder, and another its subfolder: what is in that is the same for both. When one is
/// gone the other goes on, and nobody uses any more what was mounted beneath the folder that has gone.
fn overlap(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let [whole, image] = ["whole", "image"].map(|name| pod.folder.path().join(name));
    let part = whole.join("part");
    std::fs::create_dir(&whole)?;
    // A mount that hands on that one beneath it has gone, to whoever has a copy.
    let _outer = Mounted::tmpfs(whole.clone())?;
    for folder in [&part, &whole.join("disk")] {
        std::fs::create_dir_all(folder)?;
    }
    let disk = Mounted::ext4(&image, whole.join("disk"))?;
    std::fs::write(whole.join("disk/file"), "disk\n")?;
    let probe = PathBuf::from(probe_path()?);
    let with = |name, line, volume: (PathBuf, &'static str)| Inside {
        name,
        line,
        volumes: vec![volume, (probe.clone(), PROBE)],
        ..Inside::default()
    };
    let line = "/probe hold-lock /whole/part/lock & exec /probe listen /whole/part/socket";
    let first = pod.container(&with("whole", line, (whole.clone(), "/whole")))?;
    let second = pod.container(&with("part", "sleep 1000", (part.clone(), "/part")))?;
    ensure!(pod.shell(&second, "/probe connect /part/socket hello")? == "hello");
    let lock = "/probe try-lock /part/lock || true";
    until_true("the lock is held", PATIENCE, || Ok(pod.shell(&second, lock)? == "held"))?;
    ensure!(pod.shell(&first, "cat /whole/disk/file; echo whole > /whole/part/file")? == "disk");
    pod.stop(&first, 0)?;
    pod.remove(&first)?;
    ensure!(pod.shell(&second, "cat /part/file; echo part > /part/file")? == "whole");
    ensure!(pod.shell(&second, lock)? == "free");
    ensure!(std::fs::read_to_string(part.join("file"))? == "part\n");
    nix::mount::umount(&whole.join("disk"))?;
    let free = || {
        let list = std::process::Command::new("losetup").arg("-j").arg(&image).output()?;
        Ok(list.stdout.is_empty())
    };
    until_true("the disk is free", PATIENCE, free)?;
    drop(disk);
    pod.stop(&second, 0)?;
    pod.remove(&second)
}
