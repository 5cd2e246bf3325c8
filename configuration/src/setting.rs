//! The table of settings: the one place that knows every key's name, type and range.

use std::path::PathBuf;

use toml::Value;

use crate::{Configuration, LogLevel, MachineSettings, Size};

/// How a value is written; decides how the text of an annotation is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Boolean,
    Integer,
    Text,
    TextList,
}

/// One key.
pub(crate) struct Setting {
    /// The key with its section: `machine.vcpus`.
    pub key: &'static str,
    /// How its value is written.
    pub kind: Kind,
    /// Whether an annotation may set it at all. Never a path: whoever may start a container must not
    /// choose what runs on the host.
    pub annotation: bool,
    /// Takes over a value; the error says what is expected.
    pub set: fn(&mut Configuration, &Value) -> Result<(), String>,
    /// Gives the value back, for showing and for the tests.
    pub get: fn(&Configuration) -> Value,
}

impl Setting {
    /// The key without its section, as annotations use it.
    pub fn short(&self) -> &'static str {
        self.key.rsplit('.').next().unwrap_or(self.key)
    }
}

/// Every key with its section, in the order of the shipped file.
pub fn setting_names() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.key)
}

pub(crate) static SETTINGS: &[Setting] = &[
    Setting {
        key: "machine.vmm",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| path(v).map(|v| c.machine.vmm = v),
        get: |c| c.machine.vmm.display().to_string().into(),
    },
    Setting {
        key: "machine.vcpus",
        kind: Kind::Integer,
        annotation: true,
        set: |c, v| integer(v, 1, 32).map(|v| c.machine.vcpus = v),
        get: |c| i64::from(c.machine.vcpus).into(),
    },
    Setting {
        key: "machine.memory",
        kind: Kind::Text,
        annotation: true,
        set: |c, v| memory(v).map(|v| c.machine.memory = v),
        get: |c| c.machine.memory.to_string().into(),
    },
    Setting {
        key: "machine.grow",
        kind: Kind::Boolean,
        annotation: false,
        set: |c, v| boolean(v).map(|v| c.machine.grow = v),
        get: |c| c.machine.grow.into(),
    },
    Setting {
        key: "machine.max_vcpus",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 0, 32).map(|v| c.machine.max_vcpus = v),
        get: |c| i64::from(c.machine.max_vcpus).into(),
    },
    Setting {
        key: "machine.max_memory",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| whole_mib(v).map(|v| c.machine.max_memory = v),
        get: |c| c.machine.max_memory.to_string().into(),
    },
    Setting {
        key: "machine.overhead",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| size(v).map(|v| c.machine.overhead = v),
        get: |c| c.machine.overhead.to_string().into(),
    },
    Setting {
        key: "machine.start_timeout",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 1, 600).map(|v| c.machine.start_timeout = v),
        get: |c| i64::from(c.machine.start_timeout).into(),
    },
    Setting {
        key: "machine.accept_missing",
        kind: Kind::TextList,
        annotation: false,
        set: |c, v| names(v, &MachineSettings::WALLS).map(|v| c.machine.accept_missing = v),
        get: |c| list(&c.machine.accept_missing),
    },
    Setting {
        key: "guest.kernel",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| path(v).map(|v| c.guest.kernel = v),
        get: |c| c.guest.kernel.display().to_string().into(),
    },
    Setting {
        key: "guest.initrd",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| path(v).map(|v| c.guest.initrd = v),
        get: |c| c.guest.initrd.display().to_string().into(),
    },
    Setting {
        key: "guest.command_line_extra",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| command_line(v).map(|v| c.guest.command_line_extra = v),
        get: |c| c.guest.command_line_extra.clone().into(),
    },
    Setting {
        key: "guest.console",
        kind: Kind::Boolean,
        annotation: true,
        set: |c, v| boolean(v).map(|v| c.guest.console = v),
        get: |c| c.guest.console.into(),
    },
    Setting {
        key: "guest.console_limit",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| size(v).map(|v| c.guest.console_limit = v),
        get: |c| c.guest.console_limit.to_string().into(),
    },
    Setting {
        key: "guest.debug_shell",
        kind: Kind::Boolean,
        annotation: false,
        set: |c, v| boolean(v).map(|v| c.guest.debug_shell = v),
        get: |c| c.guest.debug_shell.into(),
    },
    Setting {
        key: "guest.debug_shell_program",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| path(v).map(|v| c.guest.debug_shell_program = v),
        get: |c| c.guest.debug_shell_program.display().to_string().into(),
    },
    Setting {
        key: "files.threads",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 1, 16).map(|v| c.files.threads = v),
        get: |c| i64::from(c.files.threads).into(),
    },
    Setting {
        key: "network.queues",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 0, 8).map(|v| c.network.queues = v),
        get: |c| i64::from(c.network.queues).into(),
    },
    Setting {
        key: "network.vhost",
        kind: Kind::Boolean,
        annotation: false,
        set: |c, v| boolean(v).map(|v| c.network.vhost = v),
        get: |c| c.network.vhost.into(),
    },
    Setting {
        key: "network.receive_rate",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| size(v).map(|v| c.network.receive_rate = v),
        get: |c| c.network.receive_rate.to_string().into(),
    },
    Setting {
        key: "network.send_rate",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| size(v).map(|v| c.network.send_rate = v),
        get: |c| c.network.send_rate.to_string().into(),
    },
    Setting {
        key: "network.receive_packets",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 0, i64::from(u32::MAX)).map(|v| c.network.receive_packets = v),
        get: |c| i64::from(c.network.receive_packets).into(),
    },
    Setting {
        key: "network.send_packets",
        kind: Kind::Integer,
        annotation: false,
        set: |c, v| integer(v, 0, i64::from(u32::MAX)).map(|v| c.network.send_packets = v),
        get: |c| i64::from(c.network.send_packets).into(),
    },
    Setting {
        key: "network.ignore_rules",
        kind: Kind::Boolean,
        annotation: false,
        set: |c, v| boolean(v).map(|v| c.network.ignore_rules = v),
        get: |c| c.network.ignore_rules.into(),
    },
    Setting {
        key: "log.level",
        kind: Kind::Text,
        annotation: false,
        set: |c, v| level(v).map(|v| c.log.level = v),
        get: |c| c.log.level.as_str().into(),
    },
    Setting {
        key: "annotations.allow",
        kind: Kind::TextList,
        annotation: false,
        set: |c, v| annotation_names(v).map(|v| c.annotations.allow = v),
        get: |c| list(&c.annotations.allow),
    },
    Setting {
        key: "annotations.join",
        kind: Kind::Boolean,
        annotation: false,
        set: |c, v| boolean(v).map(|v| c.annotations.join = v),
        get: |c| c.annotations.join.into(),
    },
];

/// The known names that are most like `name`, for "did you mean".
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let short = |name: &str| name.rsplit('.').next().map(str::to_owned).unwrap_or_default();
    // The right key in the wrong section is as near as a key can be.
    known
        .map(|candidate| {
            let whole = strsim::damerau_levenshtein(name, candidate);
            let last = strsim::damerau_levenshtein(&short(name), &short(candidate));
            (whole.min(last + 1), candidate)
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4)
        .map(|(_, candidate)| candidate)
}

fn text(value: &Value) -> Option<&str> {
    value.as_str()
}

fn boolean(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "true or false, without quotes".to_owned())
}

fn integer<T: TryFrom<i64>>(value: &Value, least: i64, most: i64) -> Result<T, String> {
    value
        .as_integer()
        .filter(|number| (least..=most).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("a whole number from {least} to {most}, without quotes"))
}

fn path(value: &Value) -> Result<PathBuf, String> {
    text(value)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .ok_or_else(|| "a path from the root in quotes, such as \"/usr/local/lib/husk\"".to_owned())
}

fn size(value: &Value) -> Result<Size, String> {
    text(value)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| "a size with its unit in quotes, such as \"256MiB\" or \"2GiB\"".to_owned())
}

fn memory(value: &Value) -> Result<Size, String> {
    let least = MachineSettings::LEAST_MEMORY;
    let size = size(value)?;
    if size < least {
        return Err(format!("at least \"{least}\": the guest does not start with less memory"));
    }
    whole_mib(value)
}

fn whole_mib(value: &Value) -> Result<Size, String> {
    let size = size(value)?;
    if size.bytes() % Size::from_mib(1).bytes() != 0 {
        return Err("whole MiB, such as \"256MiB\"".to_owned());
    }
    Ok(size)
}

/// Printable ASCII only, so that it cannot be mistaken for several lines or break the boot protocol.
fn command_line(value: &Value) -> Result<String, String> {
    text(value)
        .filter(|text| text.len() <= 1024 && text.bytes().all(|b| (b' '..=b'~').contains(&b)))
        .map(str::to_owned)
        .ok_or_else(|| "at most 1024 printable ASCII characters in quotes".to_owned())
}

fn level(value: &Value) -> Result<LogLevel, String> {
    text(value)
        .and_then(|text| LogLevel::ALL.into_iter().find(|level| level.as_str() == text))
        .ok_or_else(|| format!("one of {}", LogLevel::ALL.map(LogLevel::as_str).join(", ")))
}

fn annotation_names(value: &Value) -> Result<Vec<String>, String> {
    let possible: Vec<_> =
        SETTINGS.iter().filter(|setting| setting.annotation).map(Setting::short).collect();
    names(value, &possible)
}

fn names(value: &Value, possible: &[&str]) -> Result<Vec<String>, String> {
    value
        .as_array()
        .and_then(|list| {
            list.iter()
                .map(|name| name.as_str().filter(|name| possible.contains(name)).map(str::to_owned))
                .collect()
        })
        .ok_or_else(|| format!("a list of any of \"{}\"", possible.join("\", \"")))
}

fn list(names: &[String]) -> Value {
    Value::Array(names.iter().map(|name| name.as_str().into()).collect())
}
