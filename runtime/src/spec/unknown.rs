//! Fields of a spec that its types do not know: newer than they are, or misspelt.

use oci_spec::runtime::Spec;
use serde::Deserialize;
use serde_json::Value;

use super::SpecError;

/// Reads a spec, and names the fields that say something but were not understood. They cannot be
/// carried out; whoever reads the log is to know.
pub fn parse(text: &[u8]) -> Result<(Spec, Vec<String>), SpecError> {
    let raw: Value = serde_json::from_slice(text).map_err(SpecError::Json)?;
    let spec = Spec::deserialize(&raw).map_err(SpecError::Json)?;
    let known = serde_json::to_value(&spec).map_err(SpecError::Json)?;
    let mut unknown = Vec::new();
    compare(&raw, &known, String::new(), &mut unknown);
    Ok((spec, unknown))
}

fn compare(raw: &Value, known: &Value, path: String, unknown: &mut Vec<String>) {
    match (raw, known) {
        (Value::Object(raw), Value::Object(known)) => {
            for (name, value) in raw {
                let dot = if path.is_empty() { "" } else { "." };
                let path = format!("{path}{dot}{name}");
                match known.get(name) {
                    Some(known) => compare(value, known, path, unknown),
                    None if says_nothing(value) => {}
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(raw), Value::Array(known)) => {
            for (number, (raw, known)) in raw.iter().zip(known).enumerate() {
                compare(raw, known, format!("{path}[{number}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Values that stand for an absent field.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_understood_is_named() {
        let text = br#"{
            "ociVersion": "1.1.0", "hostname": "h", "hostnam": "x", "hooks": {},
            "process": {"user": {"uid": 0, "gid": 0, "shell": "/bin/x"}, "cwd": "/", "args": ["a"]},
            "mounts": [{"destination": "/a", "sauce": "b"}, {"destination": "/b", "extra": null}]
        }"#;
        let (spec, unknown) = parse(text).unwrap();
        assert_eq!(spec.hostname().as_deref(), Some("h"));
        assert_eq!(unknown, ["hostnam", "mounts[0].sauce", "process.user.shell"]);
    }

    #[test]
    fn no_spec_is_an_error() {
        assert!(matches!(parse(b"5"), Err(SpecError::Json(_))));
        assert!(matches!(parse(b"{"), Err(SpecError::Json(_))));
    }
}
