//! Operations that are answered as if they were done, so that the guest's kernel raises their events.
//!
//! inotify in the guest knows of what the guest does only. When the host has changed a volume, the guest's
//! agent does the same once more: it announces an operation by setting [`REPEAT_ATTRIBUTE`] of the file or
//! folder, and what the announcing thread then asks of it is answered here. Nothing reaches the host, and
//! what the guest's kernel is told of names is valid for no time, so that whoever asks next is told how
//! things are. A guest that announces what it likes deceives itself.

use std::ffi::{CStr, CString};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use fuse_backend_rs::api::filesystem::{Context, Entry};
use husk_control::REPEAT_ATTRIBUTE;

use super::check_name;

/// The nodes that stand for files which are not there, and are never known.
const STAND_INS: u64 = 1 << 63;

/// The operation that is answered for one thread of the guest's, until it announces another.
#[derive(Debug, Default)]
pub struct Repeat {
    announced: Mutex<Option<Announced>>,
    stand_ins: AtomicU64,
}

#[derive(Debug)]
struct Announced {
    thread: libc::pid_t,
    node: u64,
    operation: Operation,
}

/// Operations, with names in the announced folder.
#[derive(Debug, PartialEq, Eq)]
enum Operation {
    Create(CString),
    Remove {
        name: CString,
        folder: bool,
    },
    Rename {
        old: CString,
        new: CString,
        folder: bool,
    },
    /// Of the content or the attributes of the announced file.
    Change,
}

impl Operation {
    /// Reads an announcement: words that are ended by NUL, the last one too. `None` is the end of one.
    fn parse(text: &[u8]) -> Option<Option<Self>> {
        let words: Vec<&CStr> = text
            .split_inclusive(|byte| *byte == 0)
            .map(|word| CStr::from_bytes_with_nul(word).ok())
            .collect::<Option<_>>()?;
        let name = |at: usize| check_name(words.get(at)?).ok().map(CStr::to_owned);
        let kind = words.first().map(|word| word.to_bytes());
        Some(Some(match (kind, words.len()) {
            (None, _) => return Some(None),
            (Some(b"create"), 2) => Self::Create(name(1)?),
            (Some(b"remove"), 2) => Self::Remove { name: name(1)?, folder: false },
            (Some(b"remove-folder"), 2) => Self::Remove { name: name(1)?, folder: true },
            (Some(b"rename"), 3) => Self::Rename { old: name(1)?, new: name(2)?, folder: false },
            (Some(b"rename-folder"), 3) => {
                Self::Rename { old: name(1)?, new: name(2)?, folder: true }
            }
            (Some(b"change"), 1) => Self::Change,
            _ => return None,
        }))
    }
}

impl Repeat {
    /// Answers the setting of the attribute `name`, if that announces an operation: by an error, as the
    /// guest's kernel would raise an event for the attribute.
    pub fn announce(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
    ) -> io::Result<()> {
        if name.to_bytes() != REPEAT_ATTRIBUTE.as_bytes() {
            return Ok(());
        }
        let Some(operation) = Operation::parse(value) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let thread = context.pid;
        let announced = operation.map(|operation| Announced { thread, node, operation });
        *self.announced.lock().unwrap_or_else(PoisonError::into_inner) = announced;
        Err(io::Error::from_raw_os_error(libc::EALREADY))
    }

    fn asked<T>(
        &self,
        context: &Context,
        node: u64,
        answer: impl FnOnce(&Operation) -> Option<T>,
    ) -> Option<T> {
        // No holder of the lock can panic half way, so poison means nothing.
        let announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        let announced = announced.as_ref()?;
        let meant = announced.thread == context.pid && announced.node == node;
        if meant { answer(&announced.operation) } else { None }
    }

    /// Answers the lookup of a name as it must be before the announced operation.
    pub fn look_up(&self, context: &Context, parent: u64, name: &CStr) -> Option<Entry> {
        self.asked(context, parent, |operation| match operation {
            Operation::Create(new) if **new == *name => Some(Entry::default()),
            Operation::Rename { new, .. } if **new == *name => Some(Entry::default()),
            Operation::Remove { name: old, folder } | Operation::Rename { old, folder, .. }
                if **old == *name =>
            {
                Some(self.stand_in(if *folder { libc::S_IFDIR } else { libc::S_IFREG }))
            }
            _ => None,
        })
    }

    /// Answers the creation of a folder or a file.
    pub fn create(&self, context: &Context, parent: u64, name: &CStr, kind: u32) -> Option<Entry> {
        let announced =
            |operation: &Operation| matches!(operation, Operation::Create(new) if **new == *name);
        self.asked(context, parent, |operation| {
            announced(operation).then(|| self.stand_in(kind & libc::S_IFMT))
        })
    }

    /// Answers the removal of a folder or a file.
    pub fn remove(&self, context: &Context, parent: u64, name: &CStr) -> Option<()> {
        self.asked(context, parent, |operation| {
            matches!(operation, Operation::Remove { name: old, .. } if **old == *name).then_some(())
        })
    }

    /// Answers the renaming within a folder.
    pub fn rename(&self, context: &Context, parent: u64, (from, to): (&CStr, &CStr)) -> Option<()> {
        self.asked(context, parent, |operation| match operation {
            Operation::Rename { old, new, .. } => (**old == *from && **new == *to).then_some(()),
            _ => None,
        })
    }

    /// Whether a change of attributes, or an opening that is to be one for writing, is announced.
    pub fn changes(&self, context: &Context, node: u64) -> bool {
        self.asked(context, node, |operation| (*operation == Operation::Change).then_some(()))
            .is_some()
    }

    fn stand_in(&self, kind: u32) -> Entry {
        let inode = STAND_INS | self.stand_ins.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a structure of numbers.
        let mut attr: libc::stat64 = unsafe { std::mem::zeroed() };
        attr.st_mode = kind | 0o600;
        attr.st_nlink = 1;
        attr.st_ino = inode;
        Entry { inode, attr, ..Entry::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_whole_or_refused() {
        let name = || CString::new("a").unwrap();
        assert_eq!(Operation::parse(b""), Some(None));
        assert_eq!(Operation::parse(b"create\0a\0"), Some(Some(Operation::Create(name()))));
        assert_eq!(Operation::parse(b"change\0"), Some(Some(Operation::Change)));
        let removed = Operation::Remove { name: name(), folder: true };
        assert_eq!(Operation::parse(b"remove-folder\0a\0"), Some(Some(removed)));
        for text in [
            &b"create"[..],
            b"create\0",
            b"create\0a",
            b"create\0a\0b\0",
            b"create\0a/b\0",
            b"create\0..\0",
            b"rename\0a\0",
            b"rename\0a\0\0",
            b"\0",
            b"other\0a\0",
        ] {
            assert_eq!(Operation::parse(text), None, "{text:?}");
        }
    }
}
