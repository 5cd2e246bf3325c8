//! The agent's log: kernel messages, and only if someone can read them.
//!
//! Each line on a serial console costs exits of the virtual CPU, and containers can cause lines.
//! So without a console there is no log, and with one it is limited in rate.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use slog::{Discard, Drain, KV, Key, Logger, Never, OwnedKVList, Record, Serializer, o};

/// Lines in one [`WINDOW`]; the rest are dropped.
const LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(5);
/// The kernel takes at most about a page for one record.
const LINE_LIMIT: usize = 900;

/// The guest's log: `/dev/kmsg` if there is a console.
pub fn logger() -> Logger {
    let console = OpenOptions::new().write(true).open("/dev/console");
    match console.and_then(|_| OpenOptions::new().write(true).open("/dev/kmsg")) {
        Ok(kmsg) => Logger::root(Lines::new(kmsg).fuse(), o!()),
        Err(_) => Logger::root(Discard, o!()),
    }
}

/// The log of a component test.
pub fn stderr() -> Logger {
    Logger::root(Lines::new(io::stderr()).fuse(), o!())
}

struct Budget {
    began: Instant,
    lines: u32,
}

struct Lines<W> {
    output: Mutex<(W, Budget)>,
}

impl<W: Write> Lines<W> {
    fn new(output: W) -> Self {
        Self { output: Mutex::new((output, Budget { began: Instant::now(), lines: 0 })) }
    }
}

impl<W: Write> Drain for Lines<W> {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let mut guard = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let (output, budget) = &mut *guard;
        if budget.began.elapsed() > WINDOW {
            *budget = Budget { began: Instant::now(), lines: 0 };
        }
        budget.lines += 1;
        if budget.lines > LINES {
            return Ok(());
        }
        let mut line = Line(format!("husk-agent: {}", record.msg()));
        // Writing to a string does not fail.
        let _ = record.kv().serialize(record, &mut line);
        let _ = values.serialize(record, &mut line);
        let mut text = one_line(&line.0);
        text.truncate(text.floor_char_boundary(LINE_LIMIT));
        text.push('\n');
        // One write is one record; a log that cannot be written has nobody to tell.
        let _ = output.write_all(text.as_bytes());
        Ok(())
    }
}

/// Returns `text` with control characters escaped: names of a container's must not begin a line, nor steer
/// the terminal on which an operator reads the console.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_unicode()),
            c => line.push(c),
        }
    }
    line
}

struct Line(String);

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slog::info;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic holds it").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_is_cut() {
        let buffer = Buffer::default();
        let log = Logger::root(Lines::new(buffer.clone()).fuse(), o!());
        for n in 0..1000 {
            info!(log, "flood\nof lines"; "n" => n, "name" => "\x1b[2J");
        }
        let written = buffer.0.lock().expect("no panic holds it").clone();
        let text = String::from_utf8(written).expect("the log is text");
        assert_eq!(text.lines().count(), LINES as usize);
        assert!(text.starts_with("husk-agent: flood of lines "), "{text}");
        assert!(text.contains("n=0") && text.contains(r"name=\u{1b}[2J"), "{text}");
    }
}
