//! Folders of the host's own: its `/proc`, all of it, and what its file systems judge or keep themselves.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::UNIX_EPOCH;

use anyhow::{Result, ensure};
use husk_stage::Stage;
use husk_tests::containerd::{Run, Runtime};

use crate::Case;
use crate::shared::{Part, Ran, Shared, ran, script};

pub const CASES: &[Case] = &[
    ("host::proc_is_spliced", proc_is_spliced),
    ("host::proc_has_its_sizes", proc_has_its_sizes),
    ("host::sys", sys),
    ("host::root_with_a_chroot", root_with_a_chroot),
    ("host::supplementary_groups", |runtime| probe(runtime, GROUPS, "groups")),
    ("host::append_only", |runtime| probe(runtime, APPEND_ONLY, "append-only")),
    ("host::time_of_birth", time_of_birth),
    ("host::trusted_attributes", |runtime| probe(runtime, TRUSTED, "trusted")),
    ("host::overlay_on_a_volume", overlay_on_a_volume),
];

/// `cat` sends files by sendfile(2), `dd` reads them. `kallsyms` is longer than a page.
const SPLICED: Part = Part::new(
    "spliced",
    "cd /host-proc; cat sys/kernel/hostname; cat sys/kernel/hostname > /tmp/name; cat /tmp/name; \
     for how in cat 'dd bs=1000' 'head -c 100000'; do $how < kallsyms 2>/dev/null | head -c 100000 | md5sum; done | uniq | wc -l; \
     cat kallsyms | head -c 100000 | wc -c; \
     for i in 1 2 3 4; do (for n in 1 2 3 4 5 6 7 8 9; do cat version; done | sort | uniq -c | awk '{ print $1 }') & \
     done | sort -u; wait",
);
const SIZES: Part = Part::new(
    "sizes",
    "cd /host-proc; stat -c '%s %b' version; [ -s version ] || echo empty; tail -c 3 sys/kernel/ostype; \
     cp version /tmp/version && cmp version /tmp/version && tar cf - version 2>&1 | tar tvf - | awk '{ print $3 }'",
);
const SYS: Part =
    Part::new("sys", "cat /host/sys/class/net/lo/mtu; wc -c < /host/sys/class/net/lo/mtu");
const CHROOT: Part = Part::new(
    "chroot",
    "chroot /host /usr/bin/findmnt -n -o FSTYPE /proc; chroot /host /bin/cat /proc/self/comm; \
     touch /host/x 2>&1 | grep -o Read-only; echo 5 2>/dev/null > /host/proc/self/oom_score_adj || echo refused",
);
const GROUPS: Part = Part::new("groups", "/probe groups /volume/groups 2>&1");
const APPEND_ONLY: Part = Part::new("append_only", "/probe append-only /volume 2>&1");
const BIRTH: Part = Part::new("birth", "/probe birth /volume/born 2>&1");
const TRUSTED: Part = Part::new("trusted", "/probe trusted /volume 2>&1");
const OVERLAY: Part = Part::new(
    "overlay",
    "mkdir -p /volume/o/lower /volume/o/upper /volume/o/work /volume/o/merged && cd /volume/o && \
     echo old > lower/a && echo old > lower/b && mkdir lower/c && touch lower/c/d && \
     mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged && \
     echo new > merged/a && rm merged/b && rm -r merged/c && mkdir merged/c && ls -R merged && \
     cat merged/a lower/a && umount merged",
);

/// A privileged container with the host's files.
pub static HOST: Shared<Host> = Shared::new(|runtime| {
    // On the machine's disk: in memory there are neither append-only files nor times of birth.
    let stage = Stage::new_in("/var/lib/containerd")?;
    let at = |name: &str| stage.path().join(name);
    fs::write(at("born"), "")?;
    fs::create_dir(at("groups"))?;
    for (name, group, mode) in [("read", 2000, 0o640), ("closed", 0, 0o600)] {
        let path = at("groups").join(name);
        fs::write(&path, "for the group\n")?;
        chown(&path, Some(0), Some(group))?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    chown(at("groups"), Some(0), Some(2000))?;
    fs::set_permissions(at("groups"), Permissions::from_mode(0o2770))?;
    let parts = [SPLICED, SIZES, SYS, CHROOT, GROUPS, APPEND_ONLY, BIRTH, TRUSTED, OVERLAY];
    let mut run = Run::shell(runtime, &script(&parts)).with_probe()?.flag("--privileged");
    let volume = stage.path().display().to_string();
    for (source, target, options) in [
        ("/", "/host", "rbind:ro"),
        ("/proc", "/host-proc", "rbind:ro"),
        (&volume, "/volume", "rbind:rw"),
    ] {
        let mount = format!("type=bind,src={source},dst={target},options={options}");
        run = run.flag("--mount").flag(mount);
    }
    Ok(Host { ran: ran(&run)?, stage })
});

/// Results of [`HOST`], and its folder.
pub struct Host {
    ran: Ran,
    stage: Stage,
}

fn probe(runtime: Runtime, part: Part, wanted: &str) -> Result<()> {
    let text = part.text(&HOST.of(runtime)?.ran, 0)?;
    ensure!(text == wanted, "{text:?} instead of {wanted:?}");
    Ok(())
}

fn proc_is_spliced(runtime: Runtime) -> Result<()> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    probe(runtime, SPLICED, &format!("{name}{name}1\n100000\n9"))
}

/// None, as on the host: programs read such files to their end.
fn proc_has_its_sizes(runtime: Runtime) -> Result<()> {
    probe(runtime, SIZES, "0 0\nempty\nux\n0")
}

fn sys(runtime: Runtime) -> Result<()> {
    probe(runtime, SYS, "65536\n6")
}

/// As in a node's debug container: programs of the host's find themselves in its `/proc`.
fn root_with_a_chroot(runtime: Runtime) -> Result<()> {
    let text = CHROOT.text(&HOST.of(runtime)?.ran, 0)?;
    // Of a recursive bind that is read-only, runc leaves what is mounted beneath writable.
    let wanted = if runtime == Runtime::Runc { "" } else { "\nrefused" };
    ensure!(text == format!("proc\ncat\nRead-only{wanted}"), "{text}");
    Ok(())
}

fn time_of_birth(runtime: Runtime) -> Result<()> {
    let host = HOST.of(runtime)?;
    let born = fs::metadata(host.stage.path().join("born"))?.created()?;
    let born = born.duration_since(UNIX_EPOCH)?;
    probe(runtime, BIRTH, &format!("{}.{:09}", born.as_secs(), born.subsec_nanos()))
}

fn overlay_on_a_volume(runtime: Runtime) -> Result<()> {
    probe(runtime, OVERLAY, "merged:\na\nc\n\nmerged/c:\nnew\nold")
}
