//! The text of husk.toml, and what annotations lay over it.
//!
//! What is accepted says the same when it is written out and read again, and lies in the ranges that
//! the documentation gives.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use husk_configuration::{Configuration, MachineSettings, setting_names};

use crate::file;

/// The file and, behind a zero byte, lines `name=value` of annotations.
pub fn run(data: &[u8]) {
    let (text, annotations) = match data.iter().position(|&byte| byte == 0) {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (data, &[][..]),
    };
    let Ok(configuration) = load(text) else { return };
    check(&configuration);
    let annotations: BTreeMap<String, String> = String::from_utf8_lossy(annotations)
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (format!("io.husk.{name}"), value.to_owned()))
        .collect();
    match configuration.clone().with_annotations(&annotations) {
        Err(error) => drop(error.to_string()),
        Ok(with) => {
            check(&with);
            // What runs on the host is the operator's to say.
            assert_eq!(with.machine.vmm, configuration.machine.vmm);
            assert_eq!(with.guest.kernel, configuration.guest.kernel);
            assert_eq!(with.guest.command_line_extra, configuration.guest.command_line_extra);
        }
    }
}

fn load(text: &[u8]) -> Result<Configuration, String> {
    let (_file, path) = file::of(text);
    Configuration::load(Some(&path)).map_err(|error| error.to_string())
}

fn check(configuration: &Configuration) {
    assert!((1..=32).contains(&configuration.machine.vcpus));
    assert!(configuration.machine.max_vcpus <= 32);
    assert!(configuration.machine.memory >= MachineSettings::LEAST_MEMORY);
    assert!((1..=600).contains(&configuration.machine.start_timeout));
    assert!((1..=16).contains(&configuration.files.threads));
    assert!(configuration.network.queues <= 8);
    let printable = |byte: u8| (b' '..=b'~').contains(&byte);
    assert!(configuration.guest.command_line_extra.bytes().all(printable));
    let mut text = String::new();
    for (key, value) in configuration.values() {
        assert!(setting_names().any(|name| name == key));
        let _ = writeln!(text, "{key} = {value}");
    }
    let again = load(text.as_bytes()).unwrap_or_else(|error| panic!("{error}, of:\n{text}"));
    assert!(again.values().eq(configuration.values()), "it reads as another:\n{text}");
}
