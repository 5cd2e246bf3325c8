//! A real distribution's userland, as people run it.

use anyhow::{Result, ensure};
use husk_tests::containerd::{DEBIAN, Run, Runtime};

use crate::Case;

pub const CASES: &[Case] = &[
    ("userland::apt_get", apt_get),
    ("userland::perl", perl),
    ("userland::pipeline", pipeline),
    ("userland::dpkg", dpkg),
];

fn debian(runtime: Runtime, line: &str) -> Result<String> {
    Run::new(runtime, &["bash", "-c", line]).image(DEBIAN).finish()?.text(0)
}

fn apt_get(runtime: Runtime) -> Result<()> {
    let text = debian(runtime, "apt-get --version")?;
    ensure!(text.starts_with("apt "), "{text}");
    Ok(())
}

fn perl(runtime: Runtime) -> Result<()> {
    let text = debian(runtime, "perl -e 'print join(q{,}, map { $_ ** 2 } 1..5), qq{\\n}'")?;
    ensure!(text == "1,4,9,16,25", "{text}");
    Ok(())
}

fn pipeline(runtime: Runtime) -> Result<()> {
    let line = "set -o pipefail; find /usr/bin -type f | xargs -n1 basename | sort | uniq -c | \
                awk '{ n += $1 } END { print (n > 100 ? \"many\" : \"few\") }'; \
                echo ${BASH_VERSINFO[0]} | tr 0-9 x; diff <(echo a) <(echo b) | tail -1 || true";
    let text = debian(runtime, line)?;
    ensure!(text == "many\nx\n> b", "{text}");
    Ok(())
}

fn dpkg(runtime: Runtime) -> Result<()> {
    // Writes the package database through rename and fsync, and runs maintainer scripts.
    let line = "dpkg --force-all -r e2fsprogs >/dev/null 2>&1; dpkg-query -W -f '${Status}\\n' base-files; \
                groupadd -g 4242 husk && getent group husk";
    let text = debian(runtime, line)?;
    ensure!(text == "install ok installed\nhusk:x:4242:", "{text}");
    Ok(())
}
