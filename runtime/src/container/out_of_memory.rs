//! The out-of-memory killer's strikes in a container: each is told once, in the order of the exits.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use super::{Happening, Observer};
use crate::agent_client::AgentClient;
use crate::lock::lock;

/// The guest counts, so one answer is believed no more strikes than this: each is an event.
const MOST_AT_ONCE: u64 = 64;

/// The least time between two questions: strikes come in bursts, and a hostile guest answers at
/// once.
const PAUSE: Duration = Duration::from_millis(100);

/// What has been told of one container.
pub(super) struct OutOfMemory {
    container_id: String,
    pid: u32,
    observer: Arc<dyn Observer>,
    told: Mutex<u64>,
}

impl OutOfMemory {
    pub(super) fn new(container_id: &str, pid: u32, observer: &Arc<dyn Observer>) -> Arc<Self> {
        Arc::new(Self {
            container_id: container_id.to_owned(),
            pid,
            observer: Arc::clone(observer),
            told: Mutex::default(),
        })
    }

    /// Tells the strikes that have not been told, of `strikes` that there have been.
    pub(super) fn tell(&self, strikes: u64) {
        let mut told = lock(&self.told);
        for _ in 0..strikes.saturating_sub(*told).min(MOST_AT_ONCE) {
            let happening = Happening::OutOfMemory;
            self.observer.happened(&self.container_id, "", self.pid, happening);
        }
        *told = strikes.max(*told);
    }

    /// Tells strikes as they come, until the container has ended or is forgotten.
    pub(super) fn watch(self: &Arc<Self>, agent: AgentClient) {
        let watcher = Arc::downgrade(self);
        let container_id = self.container_id.clone();
        tokio::spawn(async move {
            let told = |watcher: &Weak<Self>| watcher.upgrade().map(|this| *lock(&this.told));
            while let Some(seen) = told(&watcher) {
                // An error is the container's end as well, which its init's exit tells.
                let Ok(strikes) = agent.wait_out_of_memory(&container_id, seen).await else {
                    return;
                };
                match watcher.upgrade() {
                    Some(this) if strikes > seen => this.tell(strikes),
                    _ => return,
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Counter(Mutex<Vec<Happening>>);

    impl Observer for Counter {
        fn happened(&self, container_id: &str, exec_id: &str, pid: u32, happening: Happening) {
            assert_eq!((container_id, exec_id, pid), ("c", "", 7));
            lock(&self.0).push(happening);
        }
    }

    #[test]
    fn every_strike_is_told_once() {
        let counter = Arc::new(Counter::default());
        let observer: Arc<dyn Observer> = counter.clone();
        let killer = OutOfMemory::new("c", 7, &observer);
        let told = || lock(&counter.0).len();
        killer.tell(0);
        assert_eq!(told(), 0);
        killer.tell(2);
        killer.tell(2);
        killer.tell(1);
        assert_eq!(told(), 2);
        killer.tell(3);
        assert_eq!(told(), 3);
        killer.tell(u64::MAX);
        assert_eq!(told(), 3 + 64);
        killer.tell(u64::MAX);
        assert_eq!(told(), 3 + 64);
    }
}
