//! Netlink attributes: read from what the kernel lists, and written as another kernel takes them.

/// Bytes before an attribute's value.
const HEADER: usize = 4;
/// The bits of an attribute's type that are no flags.
const KIND: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// The attribute that every element of a list is (`NFTA_LIST_ELEM`).
pub const ELEMENT: u16 = 1;

/// Returns the attributes of a message or a nest: their types, without flags, and values.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & KIND;
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Returns the value of the first attribute of a type.
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Returns the elements of a list.
pub fn elements(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    attributes(list).filter(|(kind, _)| *kind == ELEMENT).map(|(_, value)| value)
}

/// Returns a number of nftables' own, which are in network order.
pub fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// Returns a text without the zero at its end.
pub fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = attribute(bytes, kind)?;
    Some(String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned())
}

/// Appends an attribute. One whose value is too long for its length field is cut, which the kernel that
/// reads it refuses.
pub fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(HEADER + value.len()).unwrap_or(u16::MAX);
    to.extend(length.to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(&value[..usize::from(length) - HEADER]);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// Appends an attribute that holds others.
pub fn put_nest(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    put(to, kind | NESTED, value);
}

/// Appends a number in network order.
pub fn put_number(to: &mut Vec<u8>, kind: u16, value: u32) {
    put(to, kind, &value.to_be_bytes());
}

/// Appends a text with a zero at its end.
pub fn put_text(to: &mut Vec<u8>, kind: u16, value: &str) {
    put(to, kind, &[value.as_bytes(), &[0]].concat());
}

/// Returns those attributes of a message or a nest whose types are `kept`, as they are.
pub fn only(bytes: &[u8], kept: &[u16]) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes.len());
    for (kind, value) in attributes(bytes).filter(|(kind, _)| kept.contains(kind)) {
        put(&mut all, kind, value);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_cut_off_is_not() {
        let mut nest = Vec::new();
        put_number(&mut nest, 2, 7);
        let mut bytes = Vec::new();
        put_text(&mut bytes, 1, "abc");
        put_nest(&mut bytes, 3, &nest);
        put(&mut bytes, 4, &[9]);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(text(&bytes, 1).unwrap(), "abc");
        assert_eq!(number(attribute(&bytes, 3).unwrap(), 2), Some(7));
        let kinds: Vec<_> = attributes(&only(&bytes, &[4, 1])).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [1, 4]);
        for length in 0..bytes.len() - 7 {
            assert!(attributes(&bytes[..length]).count() < 3, "{length}");
        }
        // A length of less than its own header ends the list.
        assert_eq!(attributes(&[3, 0, 1, 0, 8, 0, 1, 0]).count(), 0);
        let mut long = Vec::new();
        put(&mut long, 1, &[0; 70_000]);
        assert_eq!(long.len(), 65_536);
    }
}
