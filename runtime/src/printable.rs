//! Text of the guest's, or of whoever took its machine over, on its way to a person's terminal.
//!
//! A terminal obeys control characters: they move the cursor, retitle the window, answer into the
//! shell's input. They are written as `\u{1b}`, as in the shim's log; bytes that are not UTF-8 as
//! `\xff`. Characters that turn the direction of writing or break a line unseen count as well.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Read, Write};

const BUFFER: usize = 16 << 10;

/// Returns `text` as one line: every control character is escaped, the end of a line included.
pub fn line(text: &str) -> Cow<'_, str> {
    escape(text, commands)
}

/// Returns `text` with its lines and tabs as they are, and every other control character escaped.
pub fn lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| commands(c) && !matches!(c, '\n' | '\t'))
}

/// Copies `input` to its end, with lines and tabs as they are and every other control character
/// escaped. The carriage return of a serial console's line end is left out.
pub fn copy(mut input: impl Read, mut output: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut held = 0;
    loop {
        let count = match input.read(&mut buffer[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let length = held + count;
        let (text, taken) = decode(&buffer[..length], count == 0);
        output.write_all(lines(&text.replace("\r\n", "\n")).as_bytes())?;
        if count == 0 {
            return output.flush();
        }
        buffer.copy_within(taken..length, 0);
        held = length - taken;
    }
}

/// Returns the text of `bytes` and how many of them it is. What may go on in the bytes that follow (a
/// character, a line's end) is left for later unless these are the `last`.
fn decode(bytes: &[u8], last: bool) -> (String, usize) {
    let mut text = String::new();
    let mut rest = bytes;
    loop {
        let (valid, wrong) = match std::str::from_utf8(rest) {
            Ok(_) => (rest.len(), 0),
            Err(error) if error.error_len().is_none() && !last => (error.valid_up_to(), 0),
            Err(error) => {
                let valid = error.valid_up_to();
                (valid, error.error_len().unwrap_or(rest.len() - valid))
            }
        };
        text.push_str(&String::from_utf8_lossy(&rest[..valid]));
        for byte in &rest[valid..valid + wrong] {
            // Writing to a string does not fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
        rest = &rest[valid + wrong..];
        if wrong == 0 {
            break;
        }
    }
    let mut left = rest.len();
    if !last && left == 0 && text.ends_with('\r') {
        text.pop();
        left = 1;
    }
    (text, bytes.len() - if last { 0 } else { left })
}

/// Whether a terminal takes `c` for more than a character to show.
fn commands(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&escaped) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !escaped(c) => safe.push(c),
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            c => safe.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(line("\x1b]0;mine\x07\n"), r"\u{1b}]0;mine\u{7}\n");
        assert_eq!(lines("a\tb\nc\r\x7f\u{9b}1m"), "a\tb\nc\\r\\u{7f}\\u{9b}1m");
        assert_eq!(line("gnp.\u{202e}exe"), r"gnp.\u{202e}exe");
        assert!(matches!(line("ordinary: größe 5 µs ☃ \\n"), Cow::Borrowed(_)));
    }

    /// Gives one byte at a time.
    struct Slowly<'a>(&'a [u8]);

    impl Read for Slowly<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.0.len().min(buffer.len()).min(1);
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn a_stream_is_copied_whole_however_it_comes() {
        let input = "größe\r\n\x1b[2J\rover\r\n".as_bytes();
        let input = [input, b"\xff\xc3(", "☃\r".as_bytes(), b"\xe2\x98"].concat();
        let expected = "größe\n\\u{1b}[2J\\rover\n\\xff\\xc3(☃\\r\\xe2\\x98";
        let mut whole = Vec::new();
        copy(&input[..], &mut whole).unwrap();
        assert_eq!(String::from_utf8(whole).unwrap(), expected);
        let mut slow = Vec::new();
        copy(Slowly(&input), &mut slow).unwrap();
        assert_eq!(String::from_utf8(slow).unwrap(), expected);
        let long = "☃".repeat(BUFFER);
        let mut same = Vec::new();
        copy(long.as_bytes(), &mut same).unwrap();
        assert_eq!(String::from_utf8(same).unwrap(), long);
    }
}
