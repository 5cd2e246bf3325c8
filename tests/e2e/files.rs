//! The container's root file system behaves as a local one.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime};
use husk_tests::task::Task;

use crate::endurance::number;
use crate::shared::{Part, Ran, Shared, ran, script};
use crate::{Case, mounts, process, stdio};

pub const CASES: &[Case] = &[
    ("files::seen_on_the_host_after_exit", seen_on_the_host),
    ("files::many", many),
    ("files::links", |runtime| probe(runtime, LINKS, "links")),
    ("files::fifo", |runtime| probe(runtime, FIFO, "fifo")),
    ("files::sparse", |runtime| probe(runtime, SPARSE, "sparse")),
    ("files::fallocate", |runtime| probe(runtime, FALLOCATE, "fallocate")),
    ("files::mmap", |runtime| probe(runtime, MMAP, "mmap")),
    ("files::rename", |runtime| probe(runtime, RENAME, "rename")),
    ("files::unlinked", |runtime| probe(runtime, UNLINKED, "unlinked")),
    ("files::flock", |runtime| probe(runtime, FLOCK, "flock")),
    ("files::posix_lock", |runtime| probe(runtime, POSIX_LOCK, "posix-lock")),
    ("files::large_and_equal", large_and_equal),
    ("files::set_group_id_folder", set_group_id_folder),
    ("files::host_writes_before_an_exec", host_writes_before_an_exec),
];

const ATTRIBUTES: Part = Part::new("attributes", "/probe attributes /root");
const MANY: Part = Part::new("many", "/probe many /root $HUSK_FILES");
const LINKS: Part = Part::new("links", "/probe links /root");
const FIFO: Part = Part::new("fifo", "/probe fifo /root");
const SPARSE: Part = Part::new("sparse", "/probe sparse /root");
const FALLOCATE: Part = Part::new("fallocate", "/probe fallocate /root");
const MMAP: Part = Part::new("mmap", "/probe mmap /root");
const RENAME: Part = Part::new("rename", "/probe rename /root");
const UNLINKED: Part = Part::new("unlinked", "/probe unlinked /root");
const FLOCK: Part = Part::new("flock", "/probe flock /root");
const POSIX_LOCK: Part = Part::new("posix-lock", "/probe posix-lock /root");
const LARGE: Part = Part::new(
    "large",
    "seq 1 300000 > /root/a; cp /root/a /root/b; sync; cmp /root/a /root/b && \
     stat -c %s /root/b; sha256sum < /root/b | cut -c1-16; seq 1 300000 | sha256sum | cut -c1-16",
);
const SET_GROUP_ID: Part = Part::new(
    "set_group_id",
    "mkdir /root/d; chgrp 55 /root/d; chmod 2775 /root/d; touch /root/d/f; mkdir /root/d/e; \
     stat -c '%g %a' /root/d/f /root/d/e",
);

/// Parts that run in an ordinary container.
const PARTS: [Part; 13] = [
    ATTRIBUTES,
    MANY,
    LINKS,
    FIFO,
    SPARSE,
    FALLOCATE,
    MMAP,
    RENAME,
    UNLINKED,
    FLOCK,
    POSIX_LOCK,
    LARGE,
    SET_GROUP_ID,
];

/// A container that has ended, with what it has left on the host.
pub struct Ended {
    /// Results of the parts.
    pub ran: Ran,
    run: Run,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.run.remove();
    }
}

/// An ordinary container of the small image, with the probe: nothing but the lines is asked of it.
pub static DEFAULT: Shared<Ended> = Shared::new(|runtime| {
    let parts = [&process::PARTS[..], &stdio::PARTS, &[mounts::STANDARD], &PARTS].concat();
    let files = format!("HUSK_FILES={}", number("HUSK_FILES", FILES)?);
    let run = Run::shell(runtime, &script(&parts)).with_probe()?.flag("--env").flag(files).keep();
    let ran = ran(&run)?;
    Ok(Ended { ran, run })
});

/// Files of [`MANY`]: more than the kernel asks a file server for at once (a page of entries).
const FILES: u64 = 200;

/// Created, listed, renamed and removed.
fn many(runtime: Runtime) -> Result<()> {
    let count = number("HUSK_FILES", FILES)?;
    probe(runtime, MANY, &format!("{count} files"))
}

fn probe(runtime: Runtime, part: Part, wanted: &str) -> Result<()> {
    let text = part.text(&DEFAULT.of(runtime)?.ran, 0)?;
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn seen_on_the_host(runtime: Runtime) -> Result<()> {
    let ended = DEFAULT.of(runtime)?;
    ATTRIBUTES.text(&ended.ran, 0)?;
    let path = ended.run.upper_folder()?.join("root/attributes");
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
}

fn large_and_equal(runtime: Runtime) -> Result<()> {
    let text = LARGE.text(&DEFAULT.of(runtime)?.ran, 0)?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 3 && lines[0] == "1988895" && lines[1] == lines[2], "{text}");
    Ok(())
}

fn set_group_id_folder(runtime: Runtime) -> Result<()> {
    let text = SET_GROUP_ID.text(&DEFAULT.of(runtime)?.ran, 0)?;
    ensure!(text == "55 644\n55 2755", "{text}");
    Ok(())
}

/// An exec sees what the host wrote into the root file system just before, under names that the container
/// looks at all the time.
fn host_writes_before_an_exec(runtime: Runtime) -> Result<()> {
    let looks = "for n in 0 1 2 3 4 5 6 7 8 9; do [ -e /row/new-$n ]; [ -e /row/gone-$n ]; done; \
                 [ -s /row/replaced ]; [ -x /row/mode ]";
    let mut row = None;
    let run = Run::spec(runtime, &format!("while :; do {looks}; done"), |spec| {
        row = spec["root"]["path"].as_str().map(|root| std::path::Path::new(root).join("row"));
    })?;
    let row = row.context("the spec has no root")?;
    fs::create_dir_all(&row)?;
    for name in
        (0..10).map(|number| format!("gone-{number}")).chain(["replaced", "mode"].map(Into::into))
    {
        fs::write(row.join(name), "")?;
    }
    let task = Task::start(run)?;
    for number in 0..10 {
        fs::write(row.join(format!("new-{number}")), "new\n")?;
        fs::remove_file(row.join(format!("gone-{number}")))?;
        fs::write(row.join("next"), format!("replaced {number}\n"))?;
        fs::rename(row.join("next"), row.join("replaced"))?;
        let mode = if number % 2 == 0 { 0o755 } else { 0o644 };
        fs::set_permissions(row.join("mode"), Permissions::from_mode(mode))?;
        let line = format!(
            "cd /row; cat new-{number} replaced; [ -e gone-{number} ] && echo there; stat -c %a mode"
        );
        let text = task.shell(&line)?;
        let wanted = format!("new\nreplaced {number}\n{mode:o}");
        ensure!(text == wanted, "after {number}: {text:?} instead of {wanted:?}");
    }
    Ok(())
}
