//! Processors on and off line (Linux `Documentation/core-api/cpu_hotplug.rst`).

use std::fs;
use std::io;
use std::path::Path;

use super::MachineError;

/// No kernel of ours has more.
const MOST: u32 = 1024;

/// Brings processors on line, the lowest numbers first, or takes them off line, the highest first,
/// until `count` are. `sys` is where sysfs is. Returns how many were on line before.
pub fn set_processors(sys: &Path, count: u32) -> Result<u32, MachineError> {
    let folder = sys.join("devices/system/cpu");
    let present = list(&folder.join("present"))?;
    let online = list(&folder.join("online"))?;
    let before = u32::try_from(online.len()).unwrap_or(u32::MAX);
    let wanted = usize::try_from(count).unwrap_or(usize::MAX);
    if wanted == 0 {
        return Err(MachineError::NoProcessor);
    }
    let room = present.len();
    let (on, off) =
        present.split_at_checked(wanted).ok_or(MachineError::Room { wanted: count, room })?;
    for number in on.iter().filter(|number| !online.contains(number)) {
        switch(&folder, *number, true)?;
    }
    for number in off.iter().rev().filter(|number| online.contains(number)) {
        switch(&folder, *number, false)?;
    }
    Ok(before)
}

fn switch(folder: &Path, number: u32, on: bool) -> Result<(), MachineError> {
    let state = if on { "1" } else { "0" };
    fs::write(folder.join(format!("cpu{number}/online")), state).map_err(|source| {
        let line = if on { "on" } else { "off" };
        MachineError::Refused { what: format!("take processor {number} {line} line"), source }
    })
}

fn list(path: &Path) -> Result<Vec<u32>, MachineError> {
    let read = |source| MachineError::Read { path: path.to_path_buf(), source };
    let text = fs::read_to_string(path).map_err(read)?;
    parse(text.trim()).ok_or_else(|| read(io::ErrorKind::InvalidData.into()))
}

/// `0-3,5`
fn parse(text: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs of four processors, two of them on line.
    fn sys() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let folder = sys.path().join("devices/system/cpu");
        for number in 1..4 {
            fs::create_dir_all(folder.join(format!("cpu{number}"))).unwrap();
            fs::write(folder.join(format!("cpu{number}/online")), "-").unwrap();
        }
        fs::write(folder.join("present"), "0-3\n").unwrap();
        fs::write(folder.join("online"), "0-1\n").unwrap();
        sys
    }

    fn written(sys: &tempfile::TempDir) -> String {
        let file = |number| format!("devices/system/cpu/cpu{number}/online");
        (1..4).map(|n| fs::read_to_string(sys.path().join(file(n))).unwrap()).collect()
    }

    #[test]
    fn only_what_changes_is_written() {
        for (count, expected) in [(1, "0--"), (2, "---"), (3, "-1-"), (4, "-11")] {
            let sys = sys();
            assert_eq!(set_processors(sys.path(), count).unwrap(), 2);
            assert_eq!(written(&sys), expected, "{count}");
        }
    }

    #[test]
    fn impossible_numbers_are_refused() {
        let sys = sys();
        let refused = |count| set_processors(sys.path(), count).unwrap_err().to_string();
        assert_eq!(refused(0), "a guest has at least one processor on line");
        assert!(refused(5).contains("5 processors") && refused(5).contains("room for 4"));
        fs::remove_dir_all(sys.path().join("devices/system/cpu/cpu2")).unwrap();
        assert!(refused(3).starts_with("take processor 2 on line: "), "{}", refused(3));
    }

    #[test]
    fn lists_are_understood() {
        assert_eq!(parse("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(parse(""), Some(Vec::new()));
        for nonsense in ["0-99999999999", "0-4000000000", "all", "-1"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }
}
