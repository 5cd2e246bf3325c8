//! What has passed through the guest's network interfaces.

use std::fs;

/// More are not told of: the answer is one message.
const MOST: usize = 256;

/// Counters of one interface since it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Bytes, packets, errors, drops received.
    pub received: [u64; 4],
    /// Bytes, packets, errors, drops sent.
    pub sent: [u64; 4],
}

/// Those of the guest's network, without the loopback device.
pub fn interfaces() -> Vec<Interface> {
    parse(&fs::read_to_string("/proc/net/dev").unwrap_or_default())
}

/// The file has two lines of headings (proc(5)).
fn parse(text: &str) -> Vec<Interface> {
    let all = text.lines().skip(2).filter_map(interface);
    all.filter(|one| one.name != "lo").take(MOST).collect()
}

fn interface(line: &str) -> Option<Interface> {
    // Numbers may follow the colon at once; a name has none.
    let (name, numbers) = line.split_once(':')?;
    let numbers: Vec<u64> =
        numbers.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    let four = |at: usize| numbers.get(at..at + 4)?.try_into().ok();
    Some(Interface { name: name.trim().to_owned(), received: four(0)?, sent: four(8)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_find_their_fields() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs \
            drop fifo colls carrier compressed\n    lo:     100       1    0    0    0     0          \
            0         0      100       1    0    0    0     0       0          0\n  eth0:5000 6 7 8 9 \
            10 11 12 13 14 15 16 17 18 19 20\n  cut: 1 2 3\n";
        let eth0 = Interface {
            name: "eth0".to_owned(),
            received: [5000, 6, 7, 8],
            sent: [13, 14, 15, 16],
        };
        assert_eq!(parse(text), [eth0]);
        assert!(parse("").is_empty());
    }
}
