//! The container's root file system behaves as a local one.

use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime};

use crate::Case;
use crate::endurance::number;

pub const CASES: &[Case] = &[
    ("files::seen_on_the_host_after_exit", seen_on_the_host),
    ("files::many", many),
    ("files::links", |runtime| probe(runtime, &["links", "/root"], "links")),
    ("files::fifo", |runtime| probe(runtime, &["fifo", "/root"], "fifo")),
    ("files::sparse", |runtime| probe(runtime, &["sparse", "/root"], "sparse")),
    ("files::fallocate", |runtime| probe(runtime, &["fallocate", "/root"], "fallocate")),
    ("files::mmap", |runtime| probe(runtime, &["mmap", "/root"], "mmap")),
    ("files::rename", |runtime| probe(runtime, &["rename", "/root"], "rename")),
    ("files::unlinked", |runtime| probe(runtime, &["unlinked", "/root"], "unlinked")),
    ("files::flock", |runtime| probe(runtime, &["flock", "/root"], "flock")),
    ("files::posix_lock", |runtime| probe(runtime, &["posix-lock", "/root"], "posix-lock")),
    ("files::large_and_equal", large_and_equal),
    ("files::set_group_id_folder", set_group_id_folder),
];

/// Created, listed, renamed and removed.
fn many(runtime: Runtime) -> Result<()> {
    let count = number("HUSK_FILES", 1000)?;
    probe(runtime, &["many", "/root", &count.to_string()], &format!("{count} files"))
}

fn probe(runtime: Runtime, words: &[&str], wanted: &str) -> Result<()> {
    let text = Run::probe(runtime, words)?.finish()?.text(0)?;
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn seen_on_the_host(runtime: Runtime) -> Result<()> {
    let run = Run::probe(runtime, &["attributes", "/root"])?.keep();
    run.finish()?.text(0)?;
    let looked = (|| {
        let path = run.upper_folder()?.join("root/attributes");
        let meta = std::fs::symlink_metadata(&path).context("not on the host")?;
        ensure!(std::fs::read_to_string(&path)? == "seen by the host\n");
        ensure!((meta.uid(), meta.gid()) == (1234, 5678), "owner {} {}", meta.uid(), meta.gid());
        ensure!(meta.mode() & 0o7777 == 0o4751, "mode {:o}", meta.mode());
        let time = (meta.mtime(), meta.mtime_nsec());
        ensure!(time == (1_000_000_000, 123_456_789), "mtime {time:?}");
        let out = std::process::Command::new("getfattr")
            .args(["--only-values", "--absolute-names", "-n", "user.husk"])
            .arg(&path)
            .output()
            .context("getfattr cannot be started")?;
        ensure!(out.stdout == b"value", "xattr {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    })();
    let _ = husk_tests::containerd::ctr(&["task", "delete", &run.id]);
    run.remove()?;
    looked
}

fn large_and_equal(runtime: Runtime) -> Result<()> {
    let line = "seq 1 1000000 > /root/a; cp /root/a /root/b; sync; cmp /root/a /root/b && \
                stat -c %s /root/b; sha256sum < /root/b | cut -c1-16; seq 1 1000000 | sha256sum | cut -c1-16";
    let text = Run::shell(runtime, line).finish()?.text(0)?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 3 && lines[0] == "6888896" && lines[1] == lines[2], "{text}");
    Ok(())
}

fn set_group_id_folder(runtime: Runtime) -> Result<()> {
    let line = "mkdir /root/d; chgrp 55 /root/d; chmod 2775 /root/d; touch /root/d/f; mkdir /root/d/e; \
                stat -c '%g %a' /root/d/f /root/d/e";
    let text = Run::shell(runtime, line).finish()?.text(0)?;
    ensure!(text == "55 644\n55 2755", "{text}");
    Ok(())
}
