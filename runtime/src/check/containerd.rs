//! containerd.

use std::process::{Command, Stdio};

use super::Finding;

/// The oldest that is known to work.
const OLDEST: (u32, u32) = (1, 6);

/// Which containerd is installed.
pub fn version() -> Finding {
    let install = "install containerd 1.6 or later";
    let output = Command::new("containerd")
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else {
        return Finding::bad("containerd", "not found on PATH", install);
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match parse(&said) {
        Some((text, version)) if version >= OLDEST => Finding::good("containerd", text),
        Some((text, _)) => Finding::bad("containerd", format!("{text} is too old"), install),
        None => Finding::doubtful(
            "containerd",
            "does not say its version",
            "make sure that it is 1.6 or later",
        ),
    }
}

/// `containerd NAME VERSION REVISION`, as `containerd --version` prints it.
fn parse(said: &str) -> Option<(String, (u32, u32))> {
    let text = said.split_whitespace().nth(2)?;
    let mut numbers = text.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((text.to_owned(), (major, minor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_understood() {
        let version = |text: &str| parse(text).map(|(_, version)| version);
        let debian =
            "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1\n";
        assert_eq!(version(debian), Some((1, 6)));
        let upstream = "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b719\n";
        assert_eq!(version(upstream), Some((2, 1)));
        assert_eq!(version("containerd"), None);
        assert_eq!(version("containerd x devel y"), None);
    }
}
