//! Descriptors that are kept for nodes because they were used lately.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

/// Descriptors by node.
type Descriptors = HashMap<u64, Arc<File>>;

/// Descriptors by node, at most as many as were asked for. What was not used while half as many others
/// were is closed.
#[derive(Debug)]
pub struct Held {
    young: Descriptors,
    old: Descriptors,
    half: usize,
}

impl Held {
    /// At most `most` descriptors.
    pub fn new(most: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (most / 2).max(1) }
    }

    /// Keeps the descriptor of node `number`, and returns those that are to be closed for it: without
    /// the lock, as closing can take long.
    pub fn keep(&mut self, number: u64, file: &Arc<File>) -> Descriptors {
        if let Some(kept) = self.young.get_mut(&number) {
            if Arc::ptr_eq(kept, file) {
                return HashMap::new();
            }
            return HashMap::from([(number, std::mem::replace(kept, Arc::clone(file)))]);
        }
        let full = self.young.len() >= self.half;
        let mut gone = if full {
            std::mem::replace(&mut self.old, std::mem::take(&mut self.young))
        } else {
            HashMap::new()
        };
        if let Some(file) = self.old.remove(&number) {
            gone.insert(number, file);
        }
        self.young.insert(number, Arc::clone(file));
        gone
    }

    /// Lets go of the descriptor of node `number`.
    pub fn remove(&mut self, number: u64) -> [Option<Arc<File>>; 2] {
        [self.young.remove(&number), self.old.remove(&number)]
    }

    /// Lets go of all.
    pub fn clear(&mut self) -> [HashMap<u64, Arc<File>>; 2] {
        [std::mem::take(&mut self.young), std::mem::take(&mut self.old)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_count_is_bounded() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let mut held = Held::new(8);
        held.keep(0, &file);
        for number in 1..1000 {
            drop(held.keep(number, &file));
            drop(held.keep(0, &file));
            assert!(held.young.len() + held.old.len() <= 8);
            assert!(held.young.contains_key(&0) || held.old.contains_key(&0));
        }
        assert!(!held.young.contains_key(&1) && !held.old.contains_key(&1));
        held.remove(0);
        drop(held.clear());
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
