//! Volumes as the kubelet lays them out for pods.

use anyhow::{Result, ensure};
use husk_tests::containerd::Runtime;
use husk_tests::cri::Inside;

use crate::Case;
use crate::mounts::Mounted;
use crate::pods::{POD, memory, sleeping};

pub const CASES: &[Case] = &[("kubelet::memory_volumes", memory_volumes)];

/// An `emptyDir` of `medium: Memory`, as the kubelet lays it out: one for all containers, larger than the
/// shared memory that the engine makes, charged to who writes, and there until the pod goes.
fn memory_volumes(runtime: Runtime) -> Result<()> {
    let pod = POD.of(runtime)?;
    let whole = pod.folder.path().join("kubernetes.io~empty-dir/cache");
    let below = pod.folder.path().join("volume-subpaths/cache/c/0");
    for folder in [&whole, &below] {
        std::fs::create_dir_all(folder)?;
    }
    let memory_of_host = Mounted::tmpfs_of(whole.clone(), "size=64m,mode=2770,gid=77")?;
    let on = |name, line, place| Inside {
        name,
        line,
        volumes: vec![(whole.clone(), place)],
        ..Inside::default()
    };
    let writer = pod.container(&on("writer", "sleep 1000", "/cache"))?;
    let said = pod.shell(
        &writer,
        "stat -c '%a %u %g' /cache; df -m /cache | awk 'NR == 2 { print $2 }'; \
         grep ' /cache ' /proc/mounts | cut -d' ' -f3; echo kept >/cache/file",
    )?;
    ensure!(said == "2770 0 77\n64\ntmpfs", "{said}");
    pod.remove(&writer)?;
    let reader = pod.container(&on("reader", "sleep 1000", "/dev/shm"))?;
    ensure!(pod.shell(&reader, "cat /dev/shm/file")? == "kept");
    // Another container mounts a folder of it only, which the kubelet makes.
    std::fs::create_dir(whole.join("sub"))?;
    let bound = Mounted::bind(&whole.join("sub"), below.clone())?;
    let part = Inside { volumes: vec![(below.clone(), "/part")], ..sleeping("part") };
    let part = pod.container(&part)?;
    pod.shell(&part, "echo part >/part/file")?;
    ensure!(pod.shell(&reader, "cat /dev/shm/sub/file")? == "part");
    let line = "exec dd if=/dev/zero of=/cache/large bs=1M count=60";
    let greedy = Inside { limits: memory(32 << 20), ..on("greedy", line, "/cache") };
    let status = pod.ended(&pod.container(&greedy)?)?;
    ensure!((status.exit_code, &*status.reason) == (137, "OOMKilled"), "{status:?}");
    pod.shell(&reader, "rm -r /dev/shm/*")?;
    for id in [&reader, &part] {
        pod.remove(id)?;
    }
    drop((bound, memory_of_host));
    Ok(())
}
