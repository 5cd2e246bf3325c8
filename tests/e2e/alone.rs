//! Cases that look at the whole machine, and so run one after the other.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Run, Runtime, ctr, finish};
use husk_tests::leftovers::{Listing, available_memory, nothing_left};
use husk_tests::task::Task;

use crate::Case;

pub const CASES: &[Case] = &[
    ("alone::four_at_once_then_twenty_in_a_row", four_then_twenty),
    ("alone::nothing_left_after_a_failed_create", after_a_failed_create),
];

/// What only a microVM can do wrong.
pub const HUSK_CASES: &[Case] = &[
    ("alone::own_kernel", own_kernel),
    ("alone::limits_make_the_machine_larger", larger_machine),
    ("alone::paused_processors_stand_still", paused_processors),
    ("alone::guest_panics", guest_panics),
    ("alone::kernel_is_garbage", kernel_is_garbage),
    ("alone::initrd_is_missing", initrd_is_missing),
    ("alone::memory_of_16_mib", too_little_memory),
    ("alone::unknown_key", unknown_key),
    ("alone::wrong_type", wrong_type),
];

const PATIENCE: Duration = Duration::from_secs(10);

fn four_then_twenty(runtime: Runtime) -> Result<()> {
    // Once before, so that what is made once and stays (images' snapshots, caches) is there.
    Run::new(runtime, &["true"]).finish()?.text(0)?;
    let (before, memory) = (Listing::now()?, available_memory()?);
    let runs: Vec<Run> =
        (0..4).map(|n| Run::shell(runtime, &format!("sleep 1; echo {n}; exit {n}"))).collect();
    let children: Vec<_> = runs.iter().map(Run::spawn).collect::<Result<_>>()?;
    for (number, mut child) in (0..).zip(children) {
        drop(child.stdin.take());
        ensure!(finish(child)?.text(number)? == number.to_string());
    }
    for number in 0..20 {
        let text = Run::shell(runtime, &format!("echo {number}")).finish()?.text(0)?;
        ensure!(text == number.to_string(), "{text}");
    }
    nothing_left(&before, PATIENCE)?;
    let lost = memory.saturating_sub(available_memory()?);
    // Caches of the kernel grow a little; a leaked guest is 256 MiB, a leaked shim several.
    ensure!(lost < 48 << 20, "{} MiB of memory are missing", lost >> 20);
    Ok(())
}

fn after_a_failed_create(runtime: Runtime) -> Result<()> {
    Run::new(runtime, &["true"]).finish()?.text(0)?;
    let before = Listing::now()?;
    Run::new(runtime, &["nosuch"]).finish()?.text(1)?;
    nothing_left(&before, PATIENCE)
}

fn own_kernel(runtime: Runtime) -> Result<()> {
    let inside = Run::new(runtime, &["uname", "-r"]).finish()?.text(0)?;
    let here = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(inside.ends_with("-husk") && inside != here.trim(), "{inside} in, {here} out");
    Ok(())
}

fn larger_machine(runtime: Runtime) -> Result<()> {
    let look = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let seen = |run: Run| -> Result<(u32, u32)> {
        let text = run.finish()?.text(0)?;
        let (processors, memory) = text.split_once('\n').context("two lines")?;
        Ok((processors.parse()?, memory.parse()?))
    };
    let (processors, memory) = seen(Run::shell(runtime, look))?;
    ensure!(processors == 1 && (180..256).contains(&memory), "{processors} {memory}");
    let limited = Run::shell(runtime, look).flag("--cpus=2").flag("--memory-limit=402653184");
    let (processors, memory) = seen(limited)?;
    ensure!(processors == 2 && (384..448).contains(&memory), "{processors} {memory}");
    // Beyond the hole below 4 GiB.
    let large = Run::shell(runtime, look).flag("--annotation=io.husk.memory=4GiB");
    let (_, memory) = seen(large)?;
    ensure!((3900..4096).contains(&memory), "{memory}");
    Ok(())
}

/// What each thread of a virtual CPU waits in, by the number of the system call.
fn processor_calls(id: &str) -> Result<Vec<String>> {
    let listed = ctr(&["task", "ls"])?;
    let line = listed.lines().find(|line| line.starts_with(&format!("{id} ")));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).context("not listed")?;
    let mut calls = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        if fs::read_to_string(thread.join("comm"))?.starts_with("vcpu") {
            let call = fs::read_to_string(thread.join("syscall"))?;
            calls.push(call.split(' ').next().unwrap_or_default().to_owned());
        }
    }
    Ok(calls)
}

fn paused_processors(runtime: Runtime) -> Result<()> {
    // ioctl(2), which runs the guest, and futex(2), which waits.
    let (runs, waits) = ("16", "202");
    let task = Task::start(Run::new(runtime, &["sleep", "1000"]))?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(processor_calls(&task.id)? == [runs], "{:?}", processor_calls(&task.id)?);
    task.call("pause")?;
    ensure!(processor_calls(&task.id)? == [waits], "{:?}", processor_calls(&task.id)?);
    task.metrics()?;
    ensure!(processor_calls(&task.id)? == [waits], "{:?}", processor_calls(&task.id)?);
    task.call("resume")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(processor_calls(&task.id)? == [runs], "{:?}", processor_calls(&task.id)?);
    Ok(())
}

/// A drop-in of the configuration that lives as long as this value.
struct DropIn(PathBuf);

impl DropIn {
    fn new(text: &str) -> Result<Self> {
        let main = std::env::var("HUSK_CONFIG").context("HUSK_CONFIG is not set")?;
        let folder = PathBuf::from(format!("{main}.d"));
        fs::create_dir_all(&folder)?;
        let path = folder.join("99-test.toml");
        fs::write(&path, text)?;
        Ok(Self(path))
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs under a changed configuration: it must fail within 10 s with all of `wanted` in the error
/// on the terminal, and leave nothing.
fn fails_with(runtime: Runtime, drop_in: &str, wanted: &[&str]) -> Result<()> {
    let changed = DropIn::new(drop_in)?;
    let before = Listing::now()?;
    let since = Instant::now();
    let finished = Run::new(runtime, &["true"]).finish()?;
    let took = since.elapsed();
    drop(changed);
    ensure!(finished.code == 1, "{finished:?}");
    for text in wanted {
        ensure!(finished.stderr.contains(text), "no {text:?} in {}", finished.stderr);
    }
    ensure!(took < Duration::from_secs(10), "it took {took:?}");
    nothing_left(&before, PATIENCE)
}

fn guest_panics(runtime: Runtime) -> Result<()> {
    let drop_in = "[guest]\ncommand_line_extra = \"rdinit=/no/such/init\"\n";
    fails_with(runtime, drop_in, &["guest kernel panicked"])
}

fn kernel_is_garbage(runtime: Runtime) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), vec![0x5a; 1 << 20])?;
    let path = file.path().display().to_string();
    fails_with(runtime, &format!("[guest]\nkernel = \"{path}\"\n"), &["kernel", "ELF"])
}

fn initrd_is_missing(runtime: Runtime) -> Result<()> {
    let drop_in = "[guest]\ninitrd = \"/no/such/initrd\"\n";
    fails_with(runtime, drop_in, &["initrd", "/no/such/initrd"])
}

fn too_little_memory(runtime: Runtime) -> Result<()> {
    fails_with(runtime, "[machine]\nmemory = \"16MiB\"\n", &["memory"])
}

fn unknown_key(runtime: Runtime) -> Result<()> {
    let wanted = ["99-test.toml", "memroy", "memory"];
    fails_with(runtime, "[machine]\nmemroy = \"256MiB\"\n", &wanted)
}

fn wrong_type(runtime: Runtime) -> Result<()> {
    fails_with(runtime, "[machine]\nvcpus = \"many\"\n", &["99-test.toml", "vcpus"])
}
