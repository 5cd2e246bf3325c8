//! The files, and how they are laid over one another.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::setting::{SETTINGS, nearest, setting_names};
use crate::{Configuration, ConfigurationError};

/// The main file, unless [`CONFIGURATION_VARIABLE`] names another.
pub const DEFAULT_FILE: &str = "/etc/husk/husk.toml";

/// The environment variable that names the main file.
pub const CONFIGURATION_VARIABLE: &str = "HUSK_CONFIG";

impl Configuration {
    /// Reads the main file and its drop-ins.
    ///
    /// The main file is `path`, else the one [`CONFIGURATION_VARIABLE`] names, else [`DEFAULT_FILE`].
    /// Only the last may be missing: then the defaults hold. Drop-ins lie in the folder of the same
    /// name with `.d` appended, which may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigurationError> {
        let variable = std::env::var_os(CONFIGURATION_VARIABLE).filter(|value| !value.is_empty());
        let named = path.map(Path::to_path_buf).or(variable.map(PathBuf::from));
        let must_exist = named.is_some();
        let main = named.unwrap_or_else(|| DEFAULT_FILE.into());
        let mut configuration = Self::default();
        match std::fs::read_to_string(&main) {
            Ok(text) => configuration.merge(&main, &text)?,
            Err(error) if error.kind() == ErrorKind::NotFound && !must_exist => {}
            Err(source) => {
                let remedy = format!(
                    "correct the path, which {CONFIGURATION_VARIABLE}, --config or ConfigPath in the \
                     runtime's options names"
                );
                return Err(ConfigurationError::Read { path: main, remedy, source });
            }
        }
        for file in drop_ins(&main)? {
            let text = std::fs::read_to_string(&file).map_err(|source| {
                let remedy = "make it readable, or remove it".to_owned();
                ConfigurationError::Read { path: file.clone(), remedy, source }
            })?;
            configuration.merge(&file, &text)?;
        }
        Ok(configuration)
    }

    /// Where `key` was set: a file's path, or `default`.
    pub fn origin(&self, key: &str) -> &str {
        self.origins.get(key).map_or("default", String::as_str)
    }

    /// Whether a container's annotation set a key.
    pub fn is_annotated(&self, key: &str) -> bool {
        self.origin(key).starts_with("annotation ")
    }

    /// Every key with its value as it would be written in a file, in the order of the shipped file.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, String)> {
        SETTINGS.iter().map(|setting| (setting.key, (setting.get)(self).to_string()))
    }

    /// Lays one file over what is already there.
    fn merge(&mut self, path: &Path, text: &str) -> Result<(), ConfigurationError> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count();
            let message = error.message().replace('\n', ", ");
            ConfigurationError::Syntax { path: path.to_path_buf(), line, message }
        })?;
        let origin = path.display().to_string();
        for (section, value) in &table {
            match value {
                Value::Table(keys) if is_section(section) => {
                    for (name, value) in keys {
                        self.set(&origin, &format!("{section}.{name}"), value)?;
                    }
                }
                _ => self.set(&origin, section, value)?,
            }
        }
        Ok(())
    }

    fn set(&mut self, origin: &str, key: &str, value: &Value) -> Result<(), ConfigurationError> {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
            return Err(ConfigurationError::UnknownKey {
                origin: origin.to_owned(),
                key: key.to_owned(),
                remedy: remedy_for_unknown(key),
            });
        };
        (setting.set)(self, value).map_err(|expected| ConfigurationError::Value {
            origin: origin.to_owned(),
            key: setting.key,
            value: value.to_string(),
            expected,
        })?;
        self.origins.insert(setting.key, origin.to_owned());
        Ok(())
    }
}

fn is_section(name: &str) -> bool {
    setting_names().any(|key| key.split('.').next() == Some(name))
}

fn remedy_for_unknown(key: &str) -> String {
    match nearest(key, setting_names()) {
        Some(known) => format!("did you mean {known}?"),
        None => format!("known are {}", setting_names().collect::<Vec<_>>().join(", ")),
    }
}

/// `husk.toml.d/*.toml` beside `husk.toml`, in the order of their names.
fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigurationError> {
    let mut folder = OsString::from(main);
    folder.push(".d");
    let folder = PathBuf::from(folder);
    let fail = |source| ConfigurationError::Read {
        path: folder.clone(),
        remedy: "make it a readable folder, or remove it".to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Size;

    fn load(text: &str) -> Result<Configuration, ConfigurationError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("husk.toml");
        std::fs::write(&file, text).unwrap();
        Configuration::load(Some(&file))
    }

    fn error(text: &str) -> String {
        load(text).unwrap_err().to_string()
    }

    #[test]
    fn the_shipped_file_names_every_key_with_its_default() {
        // Each setting stands there commented out; with the comment signs taken away the file must
        // parse, and must set every key to its default.
        let shipped = include_str!("../husk.toml");
        let text: String = shipped
            .lines()
            .map(|line| {
                line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)
            })
            .map(|line| format!("{line}\n"))
            .collect();
        let configuration = load(&text).unwrap();
        let defaults = Configuration::default();
        assert!(configuration.values().eq(defaults.values()));
        let set: Vec<_> = configuration.origins.keys().copied().collect();
        let mut known: Vec<_> = setting_names().collect();
        known.sort_unstable();
        assert_eq!(set, known);
        // As shipped, it sets nothing.
        assert_eq!(load(shipped).unwrap(), defaults);
    }

    #[test]
    fn drop_ins_overrule_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("husk.toml");
        let drop_ins = folder.path().join("husk.toml.d");
        std::fs::create_dir(&drop_ins).unwrap();
        std::fs::write(&main, "[machine]\nvcpus = 2\nmemory = \"512MiB\"\n").unwrap();
        std::fs::write(drop_ins.join("20.toml"), "machine.vcpus = 4\n").unwrap();
        std::fs::write(drop_ins.join("10.toml"), "machine.vcpus = 3\n").unwrap();
        std::fs::write(drop_ins.join("90.toml.off"), "rubbish").unwrap();
        let configuration = Configuration::load(Some(&main)).unwrap();
        assert_eq!(configuration.machine.vcpus, 4);
        assert_eq!(configuration.machine.memory, Size::from_mib(512));
        assert!(configuration.origin("machine.vcpus").ends_with("husk.toml.d/20.toml"));
        assert!(configuration.origin("machine.memory").ends_with("husk.toml"));
        assert_eq!(configuration.origin("log.level"), "default");
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        assert!(
            error("[machine]\nvcpu = 1\n")
                .ends_with("husk.toml: unknown key machine.vcpu; did you mean machine.vcpus?")
        );
        assert!(error("[machine]\nkernel = \"/k\"\n").contains("did you mean guest.kernel?"));
        assert!(error("vcpus = 1\n").contains("did you mean machine.vcpus?"));
        assert!(error("[guests]\nkernel = \"/k\"\n").contains("unknown key guests; "));
        assert!(error("[machine.vcpus]\nx = 1\n").contains("expected a whole number"));
        assert!(error("[colour]\nred = 1\n").contains("known are machine.vmm, "));
    }

    #[test]
    fn a_wrong_value_says_what_is_expected() {
        let cases = [
            (
                "machine.vcpus = \"2\"",
                "machine.vcpus = \"2\": expected a whole number from 1 to 32",
            ),
            ("machine.vcpus = 33", "machine.vcpus = 33: expected a whole number from 1 to 32"),
            ("machine.memory = 256", "machine.memory = 256: expected a size with its unit"),
            ("machine.memory = \"16MiB\"", "expected at least \"64MiB\""),
            ("machine.memory = \"65537KiB\"", "expected whole MiB"),
            ("guest.kernel = \"vmlinux\"", "expected a path from the root"),
            ("guest.console = \"yes\"", "expected true or false"),
            ("guest.command_line_extra = \"a\\nb\"", "printable ASCII"),
            ("log.level = \"loud\"", "expected one of critical, error"),
            ("annotations.allow = [\"kernel\"]", "expected a list of any of \"vcpus\", "),
        ];
        for (text, expected) in cases {
            let error = error(text);
            assert!(error.contains(expected), "{error}");
            assert!(error.contains("husk.toml: "), "{error}");
        }
    }

    #[test]
    fn a_syntax_error_names_the_line() {
        assert!(error("[machine]\nvcpus = \n").contains("husk.toml: line 2: "));
    }

    #[test]
    fn a_file_asked_for_must_be_there() {
        let error = Configuration::load(Some(Path::new("/nowhere/husk.toml"))).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/husk.toml: cannot read the settings"));
    }
}
