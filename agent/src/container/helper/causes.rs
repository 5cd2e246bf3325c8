//! The causes of libcontainer's failures.
//!
//! libcontainer's processes tell each other the step that failed, as text and without what was behind it;
//! the cause is only logged. The log is kept here, in memory that all of them write to.

use std::fmt::{self, Debug, Write};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing_core::field::{Field, Visit};
use tracing_core::span::{Attributes, Id, Record};
use tracing_core::{Dispatch, Event, Level, LevelFilter, Metadata, Subscriber, dispatcher};

use crate::container::helper::report::Failure;

/// Bytes of the first line that are told.
const LONGEST: u64 = 1024;

/// The errors that libcontainer logs from now on, in this process and in those that it makes.
#[derive(Debug, Clone)]
pub struct Causes(Arc<File>);

impl Causes {
    /// Begins to collect. To be called once in a process.
    pub fn collect() -> io::Result<Self> {
        let file = memfd_create(c"causes", MFdFlags::MFD_CLOEXEC)?;
        let causes = Self(Arc::new(File::from(file)));
        let collector = Dispatch::new(Collector(causes.clone()));
        dispatcher::set_global_default(collector).map_err(io::Error::other)?;
        Ok(causes)
    }

    /// Adds the first cause to a failure that does not tell it.
    pub fn explain(&self, mut failure: Failure) -> Failure {
        if let Ok(Some(cause)) = self.first()
            && !failure.text.contains(&cause)
            // The command's failures are told by ourselves, in runc's words.
            && !failure.command
        {
            failure.text = format!("{}: {cause}", failure.text);
        }
        failure
    }

    /// Returns the first line of the log: whatever comes later says which step it was fatal for.
    fn first(&self) -> io::Result<Option<String>> {
        let mut file = &*self.0;
        file.seek(SeekFrom::Start(0))?;
        let mut text = Vec::new();
        file.take(LONGEST).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        Ok(text.lines().next().filter(|line| !line.is_empty()).map(str::to_owned))
    }
}

struct Collector(Causes);

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // None is enabled.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let text = format!("{}{}", line.message, line.fields).replace('\n', " ") + "\n";
        // One write, as another process may write too; without room for it the step has to do.
        let _ = (&*self.0.0).write_all(text.as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event as text: the message, then the other fields' values.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let written: fmt::Result = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            _ => write!(self.fields, ": {value:?}"),
        };
        // A text in memory takes everything.
        debug_assert!(written.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_is_told_once() {
        let file = memfd_create(c"causes", MFdFlags::MFD_CLOEXEC).unwrap();
        let causes = Causes(Arc::new(File::from(file)));
        let failure = || Failure::other("failed to prepare rootfs");
        assert_eq!(causes.explain(failure()), failure());
        (&*causes.0).write_all("failed to mount /x: ENOTDIR\nstep\n".as_bytes()).unwrap();
        let text = "failed to prepare rootfs: failed to mount /x: ENOTDIR";
        assert_eq!(causes.explain(failure()).text, text);
        assert_eq!(causes.explain(Failure::other(text)).text, text);
        let command = Failure::command("no such file or directory");
        assert_eq!(causes.explain(command.clone()), command);
    }
}
