//! Cases that look at the whole machine, and so run one after the other.

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::client;
use husk_tests::containerd::{Run, Runtime, finish, first_of};
use husk_tests::cri::{Inside, Pod, Wanted};
use husk_tests::leftovers::{Listing, Memory, nothing_left};
use husk_tests::task::Task;
use husk_tests::wait::{PATIENCE, until_true};
use k8s_cri::v1::LinuxContainerResources;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::endurance::number;
use crate::{Case, within};

pub const CASES: &[Case] = &[
    ("alone::four_at_once_then_many_in_a_row", four_then_many),
    ("alone::nothing_left_after_a_failed_create", after_a_failed_create),
    ("alone::clock_follows_the_hosts", clock),
];

/// Rows for what only a microVM has, which may run beside others.
pub const HUSK_CASES_BESIDE: &[Case] = &[
    ("alone::own_kernel", own_kernel),
    ("alone::limits_make_the_machine_larger", larger_machine),
    ("alone::flavours", flavours),
];

/// What only a microVM can do wrong.
pub const HUSK_CASES: &[Case] = &[
    ("alone::limits_resize_the_machine", resized_machine),
    ("alone::paused_processors_stand_still", paused_processors),
    ("alone::guest_panics", guest_panics),
    ("alone::kernel_is_garbage", kernel_is_garbage),
    ("alone::initrd_is_missing", initrd_is_missing),
    ("alone::memory_of_16_mib", too_little_memory),
    ("alone::unknown_key", unknown_key),
    ("alone::wrong_type", wrong_type),
];

/// Nothing was killed here: sooner than elsewhere.
const CLEAN_UP: Duration = Duration::from_secs(10);

/// Settings that the runtime's options name, for the machine too; a file that is missing is named.
fn flavours(runtime: Runtime) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let large = folder.path().join("large.toml");
    fs::copy(std::env::var("HUSK_CONFIG")?, &large)?;
    let size = folder.path().join("large.toml.d/size.toml");
    fs::create_dir(folder.path().join("large.toml.d"))?;
    fs::write(size, "[machine]\nmemory = \"512MiB\"\n")?;
    let with = |path: &std::path::Path| {
        let line = "awk '/MemTotal/ { print $2 }' /proc/meminfo";
        let run = Run::shell(runtime, line).flag("--runtime-config-path");
        run.flag(path.display().to_string()).finish()
    };
    let kib: u64 = with(&large)?.text(0)?.parse()?;
    ensure!(kib > 400 << 10, "{kib} KiB");
    let missing = folder.path().join("missing.toml");
    let refused = with(&missing)?;
    let named = refused.stderr.contains(&missing.display().to_string());
    ensure!(refused.code != 0 && named, "{refused:?}");
    Ok(())
}

fn four_then_many(runtime: Runtime) -> Result<()> {
    // Once before, so that what is made once and stays (images' snapshots, caches) is there.
    first_of(runtime)?;
    let (before, memory) = (Listing::now()?, Memory::now()?);
    let runs: Vec<Run> =
        (0..4).map(|n| Run::shell(runtime, &format!("sleep 1; echo {n}; exit {n}"))).collect();
    let children: Vec<_> = runs.iter().map(Run::spawn).collect::<Result<_>>()?;
    for (number, mut child) in (0..).zip(children) {
        drop(child.stdin.take());
        ensure!(finish(child)?.text(number)? == number.to_string());
    }
    for number in 0..number("HUSK_IN_A_ROW", 4)? {
        let text = Run::shell(runtime, &format!("echo {number}")).finish()?.text(0)?;
        ensure!(text == number.to_string(), "{text}");
    }
    nothing_left(&before, CLEAN_UP)?;
    // A leaked guest is more, and so are as many leaked shims.
    let mut now = memory.clone();
    let back = until_true("the memory is back", CLEAN_UP, || {
        now = Memory::now()?;
        Ok(now.lost_since(&memory) < 48 << 10)
    });
    back.with_context(|| format!("memory is missing: {}", now.changes_since(&memory)))
}

fn after_a_failed_create(runtime: Runtime) -> Result<()> {
    first_of(runtime)?;
    let before = Listing::now()?;
    Run::new(runtime, &["nosuch"]).finish()?.text(1)?;
    nothing_left(&before, CLEAN_UP)
}

/// Sets the host's clock forward while it lives.
struct Ahead(TimeSpec);

impl Ahead {
    fn by(seconds: i64) -> Result<Self> {
        let ahead = TimeSpec::seconds(seconds);
        set_forward(ahead)?;
        Ok(Self(ahead))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Err(error) = set_forward(-self.0) {
            eprintln!("cannot set the clock back: {error:#}");
        }
    }
}

fn set_forward(seconds: TimeSpec) -> Result<()> {
    let id = ClockId::CLOCK_REALTIME;
    Ok(clock_settime(id, clock_gettime(id)? + seconds)?)
}

/// How fast the clock is set to run: parts per million with 16 fractional bits.
const RATE: &str = "3276800";

fn set_rate(rate: &str) -> Result<()> {
    let status = Command::new("/bin/busybox").args(["adjtimex", "-q", "-f", rate]).status()?;
    ensure!(status.success(), "adjtimex: {status}");
    Ok(())
}

/// The container's clock after the host's has taken a step, between two looks at the host's.
fn clock(runtime: Runtime) -> Result<()> {
    const TOLERANCE: i64 = 100_000;
    let task = &within::SHARED.of(runtime)?.task;
    let now = || clock_gettime(ClockId::CLOCK_REALTIME).map(|now| now.num_microseconds());
    let look = || -> Result<()> {
        // The bound for following a step is 2 s.
        std::thread::sleep(Duration::from_millis(1700));
        let before = now()?;
        let text = task.exec(&["adjtimex"])?.text(0)?;
        let after = now()?;
        let number = |name: &str| -> Result<i64> {
            let line = text.lines().find(|line| line.contains(name)).context(text.clone())?;
            Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
        };
        let inside = number("time.tv_sec")? * 1_000_000 + number("time.tv_usec")?;
        let close = before - TOLERANCE..=after + TOLERANCE;
        ensure!(close.contains(&inside), "{inside} µs inside, {before} to {after} outside");
        ensure!(text.contains(RATE), "not the host's rate: {text}");
        Ok(())
    };
    set_rate(RATE)?;
    let ahead = Ahead::by(3600)?;
    let forward = look();
    drop(ahead);
    let back = look();
    set_rate("0")?;
    forward.context("after a step forward")?;
    back.context("after a step back")
}

fn own_kernel(runtime: Runtime) -> Result<()> {
    let inside = within::SHARED.of(runtime)?.task.exec(&["uname", "-r"])?.text(0)?;
    let here = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(inside.ends_with("-husk") && inside != here.trim(), "{inside} in, {here} out");
    Ok(())
}

fn larger_machine(runtime: Runtime) -> Result<()> {
    let look = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let read = |text: &str| -> Result<(u32, u32)> {
        let (processors, memory) = text.split_once('\n').context("two lines")?;
        Ok((processors.parse()?, memory.parse()?))
    };
    let seen = |run: Run| read(&run.finish()?.text(0)?);
    let text = within::SHARED.of(runtime)?.task.shell(look)?;
    let (processors, memory) = read(&text)?;
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

/// Processors and MiB of memory that a container of a pod sees.
fn size_seen(pod: &Pod, id: &str) -> Result<(u64, u64)> {
    let look = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let text = pod.shell(id, look)?;
    let (processors, memory) = text.split_once('\n').context("two lines")?;
    Ok((processors.parse()?, memory.parse()?))
}

/// Waits until a container of a pod sees so many processors, and memory in these bounds.
fn becomes(pod: &Pod, id: &str, processors: u64, memory: Range<u64>) -> Result<()> {
    let since = Instant::now();
    loop {
        let (seen, mib) = size_seen(pod, id)?;
        if seen == processors && memory.contains(&mib) {
            return Ok(());
        }
        let late = since.elapsed() > PATIENCE;
        ensure!(!late, "{seen} processors, {mib} MiB; not {processors}, {memory:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Clock ticks that the threads of each virtual CPU but the first have used.
fn further_processors(pod: &Pod) -> Result<Vec<u64>> {
    let pid = client::task_in("k8s.io", &pod.id)?.pid;
    let mut used = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("stat"))?;
        let (name, fields) = stat.rsplit_once(") ").context("no name")?;
        if name.contains("(vcpu") && !name.ends_with("(vcpu0") {
            let ticks = fields.split(' ').skip(11).take(2).filter_map(|t| t.parse::<u64>().ok());
            used.push(ticks.sum());
        }
    }
    Ok(used)
}

/// A running pod's machine follows the limits of its containers, up and down.
fn resized_machine(runtime: Runtime) -> Result<()> {
    let _room = DropIn::new("[machine]\nmax_vcpus = 4\nmax_memory = \"2GiB\"\n")?;
    let limits = |quota: i64, mib: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: quota,
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    };
    let inside = |name| Inside { name, line: "sleep 1000", ..Inside::default() };
    let pod = Pod::run(runtime, &Wanted::default())?;
    let first = pod.container(&inside("first"))?;
    let (processors, small) = size_seen(&pod, &first)?;
    ensure!(processors == 1 && (180..256).contains(&small), "{processors} {small}");
    pod.update(&first, limits(250_000, 512))?;
    // Whole blocks of 128 MiB, and a little of each is the kernel's.
    let (processors, grown) = size_seen(&pod, &first)?;
    ensure!(processors == 3 && grown > small + 350, "{processors} {small} {grown}");
    // More at once than it was booted with.
    let filled = pod.shell(&first, "dd if=/dev/zero of=/dev/null bs=230M count=1 && nproc")?;
    ensure!(filled == "3", "{filled}");
    let second = Inside { limits: Some(limits(50_000, 256)), ..inside("second") };
    let second = pod.container(&second)?;
    let (processors, both) = size_seen(&pod, &second)?;
    ensure!(processors == 3 && both > grown + 220, "{processors} {grown} {both}");
    pod.stop(&second, 0)?;
    pod.remove(&second)?;
    becomes(&pod, &first, 3, small + 350..grown + 1)?;
    pod.update(&first, limits(100_000, 64))?;
    becomes(&pod, &first, 1, 180..256)?;
    // Those that are off line stand still.
    let before = further_processors(&pod)?;
    std::thread::sleep(Duration::from_secs(2));
    let after = further_processors(&pod)?;
    ensure!(before.len() == 2 && before == after, "{before:?} {after:?}");
    pod.update(&first, limits(200_000, 64))?;
    ensure!(pod.shell(&first, "nproc")? == "2");
    Ok(())
}

/// What each thread of a virtual CPU waits in, by the number of the system call.
fn processor_calls(id: &str) -> Result<Vec<String>> {
    let pid = client::task(id)?.pid;
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
pub struct DropIn(PathBuf);

impl DropIn {
    /// Writes it; it must not be there.
    pub fn new(text: &str) -> Result<Self> {
        let main = std::env::var("HUSK_CONFIG").context("HUSK_CONFIG is not set")?;
        let folder = PathBuf::from(format!("{main}.d"));
        fs::create_dir_all(&folder)?;
        let path = folder.join("99-test.toml");
        fs::File::create_new(&path)?.write_all(text.as_bytes())?;
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
    nothing_left(&before, CLEAN_UP)
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
