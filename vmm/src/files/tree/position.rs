//! Positions in a folder, as the guest is told them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Positions from here to [`END`] are numbers in a table; those below are the host's own.
const FIRST: u64 = 1 << 30;
const END: u64 = 1 << 31;

/// Positions in all tables together: 32 MiB.
const MOST: usize = 4 << 20;

/// A longer table begins anew when the folder is read from its start again.
const LONG: usize = 1 << 16;

/// Entries in the tables of all open folders.
pub type Total = Arc<AtomicUsize>;

/// The positions of one open folder.
///
/// ext4 numbers the entries of a folder by 63-bit hashes, and a program that knows 32-bit positions
/// only refuses those. Such positions are numbered in the order in which they are told. If the tables
/// are full, the guest is told the host's position as it is: only 32-bit programs notice.
#[derive(Debug)]
pub struct Positions {
    /// Host positions, in the order in which the guest was told them.
    table: Vec<u64>,
    /// Index of the entry that is told next if the folder has not changed since it was read before.
    next: usize,
    total: Total,
}

impl Positions {
    /// No positions yet; the table's entries are counted in `total`.
    pub fn new(total: &Total) -> Self {
        Self { table: Vec::new(), next: 0, total: Arc::clone(total) }
    }

    /// Returns the host's position for one that the guest names, from which it reads on.
    pub fn host(&mut self, position: u64) -> io::Result<u64> {
        if position == 0 && self.table.len() >= LONG {
            self.total.fetch_sub(self.table.len(), Ordering::Relaxed);
            self.table = Vec::new();
        }
        if !(FIRST..END).contains(&position) {
            self.next = if position == 0 { 0 } else { self.table.len() };
            return Ok(position);
        }
        let index = usize::try_from(position - FIRST).unwrap_or(usize::MAX);
        let host = self.table.get(index).copied();
        self.next = index.saturating_add(1);
        host.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Returns the position to tell the guest for one of the host's.
    pub fn guest(&mut self, host: u64) -> io::Result<u64> {
        if host < FIRST {
            return Ok(host);
        }
        if self.table.get(self.next) != Some(&host) {
            if self.total.fetch_add(1, Ordering::Relaxed) >= MOST {
                self.total.fetch_sub(1, Ordering::Relaxed);
                // A number of the table's range would be taken for an entry.
                return if host < END {
                    Err(io::Error::from_raw_os_error(libc::ENOMEM))
                } else {
                    Ok(host)
                };
            }
            self.next = self.table.len();
            self.table.push(host);
        }
        let position = FIRST + self.next as u64;
        self.next += 1;
        Ok(position)
    }
}

impl Drop for Positions {
    fn drop(&mut self) {
        self.total.fetch_sub(self.table.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions() -> Positions {
        Positions::new(&Total::default())
    }

    #[test]
    fn long_positions_become_short_and_lead_back() {
        let mut positions = positions();
        let long = [1 << 40, 3 << 33, u64::MAX >> 1];
        let told: Vec<_> = long.iter().map(|host| positions.guest(*host).unwrap()).collect();
        assert!(told.iter().all(|position| *position < END), "{told:?}");
        for (host, position) in long.iter().zip(&told).rev() {
            assert_eq!(positions.host(*position).unwrap(), *host);
        }
        assert_eq!(positions.guest(7).unwrap(), 7);
        assert_eq!(positions.host(7).unwrap(), 7);
        positions.host(FIRST + 3).unwrap_err();
        positions.host(END - 1).unwrap_err();
    }

    #[test]
    fn a_folder_read_again_costs_nothing() {
        let mut positions = positions();
        for _ in 0..3 {
            positions.host(0).unwrap();
            for host in 0..100 {
                assert_eq!(positions.guest((1 << 40) + host).unwrap(), FIRST + host);
            }
        }
        assert_eq!(positions.total.load(Ordering::Relaxed), 100);
        // From the middle too, and an entry that had no room in the answer is told again.
        positions.host(FIRST + 49).unwrap();
        assert_eq!(positions.guest((1 << 40) + 50).unwrap(), FIRST + 50);
        assert_eq!(positions.total.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn full_tables_give_way_to_the_hosts_positions() {
        let total = Total::new(AtomicUsize::new(MOST - 1));
        let mut positions = Positions::new(&total);
        assert_eq!(positions.guest(1 << 40).unwrap(), FIRST);
        assert_eq!(positions.guest(1 << 41).unwrap(), 1 << 41);
        assert_eq!(positions.host(1 << 41).unwrap(), 1 << 41);
        positions.guest(FIRST + 5).unwrap_err();
        drop(positions);
        assert_eq!(total.load(Ordering::Relaxed), MOST - 1);
    }

    #[test]
    fn a_long_table_ends_with_the_listing() {
        let mut positions = positions();
        for host in 0..LONG as u64 {
            positions.guest((1 << 40) + host).unwrap();
        }
        positions.host(0).unwrap();
        assert_eq!(positions.total.load(Ordering::Relaxed), 0);
    }
}
