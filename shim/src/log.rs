//! The log: lines into containerd's FIFO `log` in the bundle, which containerd copies into its own.
//!
//! Nobody may read it, so the FIFO is never waited for: what does not fit is dropped.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use slog::{Drain, KV, Key, Level, Logger, OwnedKVList, Record, Serializer, o};

/// A logger into the FIFO `path`; silent if there is none.
pub fn logger(path: &Path, level: Level, sandbox: &str) -> Logger {
    // Read-write: it opens without a reader and outlives containerd's restarts.
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).ok();
    let drain = Lines { file: file.map(Mutex::new), level };
    Logger::root(drain.ignore_res(), o!("sandbox" => sandbox.to_owned()))
}

struct Lines {
    file: Option<Mutex<File>>,
    level: Level,
}

impl Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), slog::Never> {
        let Some(file) = self.file.as_ref().filter(|_| record.level().is_at_least(self.level))
        else {
            return Ok(());
        };
        let line = line(record, values);
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // One write a line: whole or not at all, as long as it fits into a pipe's atomic write.
        let _ = file.write_all(line.as_bytes());
        Ok(())
    }
}

/// In the form of containerd's own lines: `time=… level=… msg=… key=value`.
fn line(record: &Record<'_>, values: &OwnedKVList) -> String {
    let level = match record.level() {
        Level::Critical => "fatal",
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let now = Timestamp::now();
    let time = rfc3339(now.seconds, now.nanos);
    let mut line = Line(format!("time=\"{time}\" level={level} msg="));
    line.value(&record.msg().to_string());
    let _ = record.kv().serialize(record, &mut line);
    let _ = values.serialize(record, &mut line);
    line.0.push('\n');
    line.0
}

struct Line(String);

impl Line {
    fn value(&mut self, value: &str) {
        // Quoted and escaped: no value begins a line of its own or steers a terminal.
        let _ = write!(self.0, "{value:?}");
    }
}

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        let _ = write!(self.0, " {key}=");
        self.value(&value.to_string());
        Ok(())
    }
}

/// Seconds since the epoch as a date, by the civil calendar.
fn rfc3339(seconds: i64, nanos: i32) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March here, so that the leap day is the last; 400 years are an era.
    let shifted = days + 719_468;
    let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let millis = nanos / 1_000_000;
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::io::Read;

    #[test]
    fn dates() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_827_696, 7_000_000), "2000-02-29T12:34:56.007Z");
        assert_eq!(rfc3339(1_795_437_480, 0), "2026-11-23T12:38:00.000Z");
        assert_eq!(rfc3339(4_107_542_400, 0), "2100-03-01T00:00:00.000Z");
    }

    #[test]
    fn nobody_reading_neither_blocks_nor_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let log = logger(&path, Level::Info, "s");
        for number in 0..10_000 {
            slog::info!(log, "line"; "number" => number);
        }
        let mut reader =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut start = vec![0; 4096];
        let length = reader.read(&mut start).unwrap();
        let text = String::from_utf8_lossy(&start[..length]);
        let first = text.lines().next().unwrap();
        assert!(first.contains(r#" level=info msg="line" number="0" sandbox="s""#), "{first}");
    }

    #[test]
    fn less_important_lines_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "").unwrap();
        let log = logger(&path, Level::Warning, "s");
        slog::info!(log, "no");
        slog::warn!(log, "two\nlines"; "name" => "\x1b[2J\u{9b}m\u{202e}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains(r#"name="\u{1b}[2J\u{9b}m\u{202e}""#), "{text}");
        assert!(text.contains(r#"msg="two\nlines""#), "{text}");
    }
}
