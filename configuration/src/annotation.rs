//! Settings that a container brings along.

use std::collections::BTreeMap;

use toml::Value;

use crate::setting::{Kind, SETTINGS, Setting, nearest};
use crate::{Configuration, ConfigurationError};

/// What the annotations meant for Husk begin with.
pub const ANNOTATION_PREFIX: &str = "io.husk.";

impl Configuration {
    /// The configuration with the annotations `io.husk.…` laid over it; others are not looked at.
    ///
    /// An annotation is named as the key without its section: `io.husk.memory`.
    pub fn with_annotations(
        mut self,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, ConfigurationError> {
        for (name, text) in annotations {
            if let Some(short) = name.strip_prefix(ANNOTATION_PREFIX) {
                self.annotate(name, short, text)?;
            }
        }
        Ok(self)
    }

    fn annotate(&mut self, name: &str, short: &str, text: &str) -> Result<(), ConfigurationError> {
        let Some(setting) = possible().find(|setting| setting.short() == short) else {
            return Err(ConfigurationError::UnknownAnnotation {
                name: name.to_owned(),
                remedy: remedy_for_unknown(short),
            });
        };
        if !self.annotations.allow.iter().any(|allowed| allowed == short) {
            let origin = match self.origin("annotations.allow") {
                "default" => crate::DEFAULT_FILE,
                origin => origin,
            };
            return Err(ConfigurationError::ForbiddenAnnotation {
                name: name.to_owned(),
                short: short.to_owned(),
                origin: origin.to_owned(),
            });
        }
        (setting.set)(self, &read(setting.kind, text)).map_err(|expected| {
            ConfigurationError::Value {
                origin: format!("annotation {name}"),
                key: setting.key,
                value: text.to_owned(),
                expected,
            }
        })?;
        self.origins.insert(setting.key, format!("annotation {name}"));
        Ok(())
    }
}

fn possible() -> impl Iterator<Item = &'static Setting> {
    SETTINGS.iter().filter(|setting| setting.annotation)
}

/// An annotation is always text; a text that does not fit its kind stays text, which the setting
/// then refuses in its own words.
fn read(kind: Kind, text: &str) -> Value {
    let value = match kind {
        Kind::Boolean => text.parse().ok().map(Value::Boolean),
        Kind::Integer => text.parse().ok().map(Value::Integer),
        Kind::Text | Kind::TextList => None,
    };
    value.unwrap_or_else(|| Value::String(text.to_owned()))
}

fn remedy_for_unknown(short: &str) -> String {
    match nearest(short, possible().map(Setting::short)) {
        Some(known) => format!("did you mean {ANNOTATION_PREFIX}{known}?"),
        None => {
            let known: Vec<_> = possible()
                .map(|setting| format!("{ANNOTATION_PREFIX}{}", setting.short()))
                .collect();
            format!("known are {}", known.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Size;

    fn with(pairs: &[(&str, &str)]) -> Result<Configuration, ConfigurationError> {
        let annotations =
            pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Configuration::default().with_annotations(&annotations)
    }

    #[test]
    fn set_what_is_allowed() {
        let configuration = with(&[
            ("io.husk.memory", "512MiB"),
            ("io.husk.vcpus", "2"),
            ("io.husk.console", "true"),
            ("io.kubernetes.cri.sandbox-id", "x"),
        ])
        .unwrap();
        assert_eq!(configuration.machine.memory, Size::from_mib(512));
        assert_eq!(configuration.machine.vcpus, 2);
        assert!(configuration.guest.console);
        assert_eq!(configuration.origin("machine.vcpus"), "annotation io.husk.vcpus");
    }

    #[test]
    fn are_refused_with_the_remedy() {
        let error = with(&[("io.husk.memroy", "1GiB")]).unwrap_err().to_string();
        assert_eq!(error, "unknown annotation io.husk.memroy; did you mean io.husk.memory?");
        // A path is unknown as an annotation, whatever the operator allows.
        let error = with(&[("io.husk.kernel", "/k")]).unwrap_err().to_string();
        assert!(error.contains("known are io.husk.vcpus"), "{error}");
        let error = with(&[("io.husk.vcpus", "two")]).unwrap_err().to_string();
        assert!(error.contains("machine.vcpus = two: expected a whole number"), "{error}");
        let error = with(&[("io.husk.memory", "16MiB")]).unwrap_err().to_string();
        assert!(error.contains("at least \"64MiB\""), "{error}");
    }

    #[test]
    fn the_operator_has_the_last_word() {
        let mut configuration = Configuration::default();
        configuration.annotations.allow.clear();
        let annotations = BTreeMap::from([("io.husk.vcpus".to_owned(), "2".to_owned())]);
        let error = configuration.with_annotations(&annotations).unwrap_err().to_string();
        assert!(error.contains("add \"vcpus\" to annotations.allow in /etc/husk/husk.toml"));
    }

    #[test]
    fn short_names_are_unique() {
        let mut names: Vec<_> = possible().map(Setting::short).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
