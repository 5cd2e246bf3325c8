//! JSON that is nearly what somebody expects.

use serde_json::{Map, Number, Value};

use crate::input::Input;

/// No document is changed more often.
const MOST: usize = 64;

/// Values are not doubled beyond this many bytes of text, so that documents stay small.
const LONGEST: usize = 4096;

/// The input itself if it begins as an object does; else `template`, bent by it.
pub fn text(data: &[u8], template: &str, words: &[&str]) -> Vec<u8> {
    if data.first() == Some(&b'{') {
        return data.to_vec();
    }
    let template = serde_json::from_str(template).expect("JSON");
    bend(template, words, &mut Input(data)).to_string().into_bytes()
}

/// `document` with changes that the input chooses, until it is used up: values replaced, taken out,
/// doubled or moved elsewhere. `words` are texts that mean something somewhere.
pub fn bend(mut document: Value, words: &[&str], input: &mut Input<'_>) -> Value {
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        change(&mut document, words, input);
    }
    document
}

fn change(document: &mut Value, words: &[&str], input: &mut Input<'_>) {
    let deed = input.byte();
    let node = walk(document, input);
    match deed % 8 {
        0..=2 => *node = value(words, input, 2),
        3 => match node {
            Value::Object(map) => {
                let name = word(words, input);
                map.insert(name, value(words, input, 2));
            }
            Value::Array(list) => list.push(value(words, input, 2)),
            _ => *node = Value::Null,
        },
        4 => match node {
            Value::Object(map) => {
                let at = usize::from(input.byte()) % map.len().max(1);
                if let Some(name) = map.keys().nth(at).cloned() {
                    map.remove(&name);
                }
            }
            Value::Array(list) => drop(list.pop()),
            _ => *node = Value::Array(vec![node.clone()]),
        },
        5 => match node {
            Value::Array(list) => {
                let one = list.first().cloned().unwrap_or_else(|| value(words, input, 1));
                let count = usize::from(input.byte()).min(LONGEST / length(&one));
                list.extend(std::iter::repeat_n(one, count));
            }
            Value::String(text) => {
                let count = usize::from(input.byte()).min(LONGEST / text.len().max(1));
                *text = text.repeat(count.max(1));
            }
            _ => *node = value(words, input, 1),
        },
        6 => {
            let copy = node.clone();
            if length(&copy) < LONGEST / 16 {
                *walk(document, input) = copy;
            }
        }
        _ => {
            if let Value::String(text) = node {
                let place = usize::from(input.byte()) % (text.len() + 1);
                let place = text.floor_char_boundary(place);
                text.insert(place, char::from(input.byte()));
            }
        }
    }
}

fn length(value: &Value) -> usize {
    value.to_string().len()
}

/// A value somewhere inside.
fn walk<'a>(mut value: &'a mut Value, input: &mut Input<'_>) -> &'a mut Value {
    loop {
        let step = usize::from(input.byte());
        let count = match value {
            Value::Object(map) => map.len(),
            Value::Array(list) => list.len(),
            _ => 0,
        };
        if count == 0 || step >= 240 {
            return value;
        }
        value = match value {
            Value::Object(map) => map.values_mut().nth(step % count).expect("less than its length"),
            Value::Array(list) => &mut list[step % count],
            _ => unreachable!("nothing else holds values"),
        };
    }
}

fn value(words: &[&str], input: &mut Input<'_>, depth: u8) -> Value {
    match input.byte() % if depth == 0 { 8 } else { 10 } {
        0 => Value::Null,
        1 => Value::Bool(input.byte() & 1 == 1),
        2 => Number::from(input.byte()).into(),
        3 => Number::from(-i64::from(input.long())).into(),
        4 => match input.byte() % 6 {
            0 => i64::MAX.into(),
            1 => i64::MIN.into(),
            2 => u64::MAX.into(),
            3 => u32::MAX.into(),
            4 => 1e300.into(),
            _ => (u64::from(input.long()) << (input.byte() % 33)).into(),
        },
        5..=7 => word(words, input).into(),
        8 => (0..input.byte() % 4).map(|_| value(words, input, depth - 1)).collect(),
        _ => {
            let mut map = Map::new();
            for _ in 0..input.byte() % 4 {
                map.insert(word(words, input), value(words, input, depth - 1));
            }
            map.into()
        }
    }
}

fn word(words: &[&str], input: &mut Input<'_>) -> String {
    let choice = input.byte();
    if choice < 200 && !words.is_empty() {
        return words[usize::from(choice) % words.len()].to_owned();
    }
    let length = usize::from(choice % 16);
    let bytes: Vec<u8> = (0..length).map(|_| input.byte()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
