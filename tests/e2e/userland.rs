//! A real distribution's userland, as people run it.

use anyhow::{Result, ensure};
use husk_tests::containerd::{DEBIAN, Run, Runtime};

use crate::Case;
use crate::shared::{Part, Ran, Shared, ran, script};

pub const CASES: &[Case] = &[
    ("userland::apt_get", apt_get),
    ("userland::perl", perl),
    ("userland::pipeline", pipeline),
    ("userland::dpkg", dpkg),
];

const APT_GET: Part = Part::new("apt_get", "apt-get --version");
const PERL: Part = Part::new("perl", "perl -e 'print join(q{,}, map { $_ ** 2 } 1..5), qq{\\n}'");
const PIPELINE: Part = Part::new(
    "pipeline",
    "set -o pipefail; find /usr/bin -type f | xargs -n1 basename | sort | uniq -c | \
     awk '{ n += $1 } END { print (n > 100 ? \"many\" : \"few\") }'; \
     echo ${BASH_VERSINFO[0]} | tr 0-9 x; diff <(echo a) <(echo b) | tail -1 || true",
);
/// Writes the package database through rename and fsync, and runs maintainer scripts.
const DPKG: Part = Part::new(
    "dpkg",
    "dpkg --force-all -r e2fsprogs >/dev/null 2>&1; dpkg-query -W -f '${Status}\\n' base-files; \
     groupadd -g 4242 husk && getent group husk",
);

/// A container of the image with a real userland.
pub static DEBIAN_RAN: Shared<Ran> = Shared::new(|runtime| {
    let script = script(&[APT_GET, PERL, PIPELINE, DPKG]);
    ran(&Run::new(runtime, &["bash", "-c", &script]).image(DEBIAN))
});

fn text(runtime: Runtime, part: Part) -> Result<String> {
    part.text(&*DEBIAN_RAN.of(runtime)?, 0)
}

fn apt_get(runtime: Runtime) -> Result<()> {
    let text = text(runtime, APT_GET)?;
    ensure!(text.starts_with("apt "), "{text}");
    Ok(())
}

fn perl(runtime: Runtime) -> Result<()> {
    let text = text(runtime, PERL)?;
    ensure!(text == "1,4,9,16,25", "{text}");
    Ok(())
}

fn pipeline(runtime: Runtime) -> Result<()> {
    let text = text(runtime, PIPELINE)?;
    ensure!(text == "many\nx\n> b", "{text}");
    Ok(())
}

fn dpkg(runtime: Runtime) -> Result<()> {
    let text = text(runtime, DPKG)?;
    ensure!(text == "install ok installed\nhusk:x:4242:", "{text}");
    Ok(())
}
