//! A running sandbox.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_agent_protocols::agent::DiskUse;
use husk_control::MachineRequest;
use oci_spec::runtime::LinuxResources;
use slog::{Logger, info, warn};

use super::SandboxError;
use super::clock;
use super::create::Place;
use super::network::SandboxNetwork;
use super::oom_scores::OomScores;
use crate::container::{Container, ContainerError, CreateRequest, Exit, Follower, Statistics};
use crate::error::chain;
use crate::lock::lock;
use crate::machine::{FileServer, MachineEnd};
use crate::resource::network::NetworkError;
use crate::resource::{Cpuset, Limits};
use crate::shell::ShellDoor;

/// No guest has more disks.
const MOST_DISKS: usize = 256;

/// How long the guest may take to answer that it is ending, and then to end.
const ORDERLY: Duration = Duration::from_secs(2);

/// A running sandbox.
pub struct Sandbox {
    follower: Follower,
    files: Arc<FileServer>,
    network: Arc<SandboxNetwork>,
    place: Mutex<Option<Place>>,
    door: Mutex<Option<ShellDoor>>,
    oom_scores: OomScores,
    containers: Mutex<HashMap<String, Slot>>,
    log: Logger,
}

/// A name is taken from the moment its creation begins.
enum Slot {
    Creating,
    Created(Arc<Container>),
}

impl Slot {
    fn made(&self) -> Option<Arc<Container>> {
        match self {
            Self::Creating => None,
            Self::Created(container) => Some(Arc::clone(container)),
        }
    }
}

/// Adds counters; limits are each container's own, and the sum has none.
fn add(sum: &mut Statistics, used: Statistics) {
    for (all, one) in [
        (&mut sum.cpu_stat, used.cpu_stat),
        (&mut sum.memory_stat, used.memory_stat),
        (&mut sum.memory_events, used.memory_events),
    ] {
        add_counters(all, one);
    }
    for (all, one) in [
        (&mut sum.memory_current, used.memory_current),
        (&mut sum.swap_current, used.swap_current),
        (&mut sum.pids_current, used.pids_current),
    ] {
        *all = all.saturating_add(one);
    }
    for disk in used.io_stat.into_iter().take(MOST_DISKS) {
        let same = |one: &&mut DiskUse| (one.major, one.minor) == (disk.major, disk.minor);
        match sum.io_stat.iter_mut().find(same) {
            Some(all) => add_counters(&mut all.counters, disk.counters),
            None => sum.io_stat.push(disk),
        }
    }
}

fn add_counters(sum: &mut HashMap<String, u64>, used: HashMap<String, u64>) {
    for (name, count) in used {
        let all = sum.entry(name).or_default();
        *all = all.saturating_add(count);
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sandbox")
    }
}

impl Sandbox {
    pub(super) fn new(
        follower: Follower,
        files: Arc<FileServer>,
        place: Place,
        network: Arc<SandboxNetwork>,
        door: Option<ShellDoor>,
        oom_scores: OomScores,
        log: &Logger,
    ) -> Arc<Self> {
        network.follow(&follower.machine, &follower.agent);
        clock::follow(&follower.machine, &follower.agent, log);
        let sandbox = Arc::new(Self {
            follower,
            files,
            network,
            place: Mutex::new(Some(place)),
            door: Mutex::new(door),
            oom_scores,
            containers: Mutex::default(),
            log: log.clone(),
        });
        tokio::spawn(Arc::clone(&sandbox).watch_files());
        sandbox
    }

    /// The process id that stands for all of it on the host: the machine's.
    pub fn pid(&self) -> u32 {
        self.follower.machine.pid()
    }

    /// Waits for the machine's end, and says why it came.
    pub async fn ended(&self) -> MachineEnd {
        self.follower.machine.end().await
    }

    /// What its containers use together, as the guest counts it.
    pub async fn statistics(&self) -> Result<Statistics, ContainerError> {
        let containers: Vec<_> = lock(&self.containers).values().filter_map(Slot::made).collect();
        let mut sum = Statistics {
            memory_max: u64::MAX,
            swap_max: u64::MAX,
            pids_max: u64::MAX,
            ..Default::default()
        };
        for container in containers {
            match container.statistics().await {
                Ok(used) => add(&mut sum, used),
                // One that has been deleted meanwhile uses nothing; without a machine there is none.
                Err(error) if self.follower.machine.ended().is_some() => return Err(error),
                Err(_) => {}
            }
        }
        Ok(sum)
    }

    /// Creates a container.
    pub async fn create_container(
        &self,
        mut request: CreateRequest,
    ) -> Result<Arc<Container>, ContainerError> {
        let id = request.id.clone();
        let resources = request.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpuset = resources.map(Cpuset::of).transpose()?.unwrap_or_default();
        let limits = resources.map(Limits::of_container).unwrap_or_default();
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(ContainerError::Exists(id));
            }
            containers.insert(id.clone(), Slot::Creating);
        }
        let place = lock(&self.place).as_ref().map(|place| {
            place.complete(&id, &mut request.spec);
            place.parts()
        });
        let score = request.spec.process().as_ref().and_then(|process| process.oom_score_adj());
        self.oom_scores.add(&id, score);
        let created = match place {
            Some((share, volumes)) => match self.confine(&id, Some(cpuset)) {
                Ok(()) => {
                    let created = Container::create(request, share, volumes, self.follower.clone());
                    let created = self.follower.size.with_container(&id, limits, created).await;
                    created.map_err(|error| self.follower.explain(error))
                }
                Err(error) => Err(error),
            },
            None => Err(ContainerError::MachineEnded("it is being stopped".to_owned())),
        };
        let mut containers = lock(&self.containers);
        match created {
            Ok(container) => {
                let container = Arc::new(container);
                containers.insert(id, Slot::Created(Arc::clone(&container)));
                Ok(container)
            }
            Err(error) => {
                containers.remove(&id);
                self.oom_scores.remove(&id);
                self.release(&id);
                Err(error)
            }
        }
    }

    /// Changes the limits that `resources` names of a container's, and what follows from them.
    pub async fn update(&self, id: &str, resources: LinuxResources) -> Result<(), ContainerError> {
        let container = self.container(id)?;
        let before = lock(&self.place).as_ref().and_then(|place| place.cpuset(id));
        let mut set = before.clone().unwrap_or_default();
        set.change(&resources)?;
        self.confine(id, Some(set))?;
        let updated = container.update(resources).await;
        if updated.is_err() {
            self.confine(id, before)?;
        }
        updated
    }

    /// Lets the sandbox run on what its containers may use together, now that this one may use `set`.
    fn confine(&self, id: &str, set: Option<Cpuset>) -> Result<(), ContainerError> {
        let place = lock(&self.place);
        let confined = place.as_ref().map_or(Ok(()), |place| place.confine(id, set));
        confined.map_err(ContainerError::Confine)
    }

    /// Lets the sandbox run on what its other containers may use, now that this one has gone.
    fn release(&self, id: &str) {
        if let Err(error) = self.confine(id, None) {
            warn!(self.log, "CPUs of a container that has gone stay"; "error" => chain(&error));
        }
    }

    /// Sees to it that the guest has the network that is there now: engines lay it between the
    /// creation of a container and its start. Packet filter rules in the namespace that the guest does not
    /// carry out are an error.
    pub async fn settle_network(&self) -> Result<(), SandboxError> {
        let Follower { machine, agent, .. } = &self.follower;
        match self.network.refresh(machine, agent).await {
            Ok(()) => {}
            Err(error @ (NetworkError::Rules(_) | NetworkError::RulesNotTold(_))) => {
                return Err(SandboxError::Network(error));
            }
            Err(error) => warn!(self.log, "network: not looked at"; "error" => chain(&error)),
        }
        self.network.check().await.map_err(SandboxError::Network)
    }

    /// The container of that name.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        match lock(&self.containers).get(id) {
            Some(Slot::Created(container)) => Ok(Arc::clone(container)),
            _ => Err(ContainerError::NoContainer(id.to_owned())),
        }
    }

    /// Deletes a container that does not run; how its init ended.
    pub async fn delete_container(&self, id: &str) -> Result<Exit, ContainerError> {
        let exit = self.container(id)?.delete().await?;
        lock(&self.containers).remove(id);
        self.oom_scores.remove(id);
        self.release(id);
        self.follower.size.remove_container(id).await;
        Ok(exit)
    }

    /// Whether no container is left.
    pub fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// Ends the machine, in order if containers still run, and removes everything. Can be called again.
    pub async fn stop(&self) {
        self.stop_within(2 * ORDERLY).await;
    }

    /// Like [`Sandbox::stop`], with no more than `patience` for an orderly end.
    pub async fn stop_within(&self, patience: Duration) {
        let machine = &self.follower.machine;
        drop(lock(&self.door).take());
        // With every container deleted there is nothing in the guest to save: what they wrote to the
        // shared folder is on the host (the guest's cache is written through), the rest is theirs.
        if machine.ended().is_none() && !self.is_empty() {
            let orderly = async {
                // The order matters: the guest resets right after its answer.
                machine.request(MachineRequest::ExpectEnd, &[]).await.ok()?;
                self.follower.agent.shutdown(ORDERLY).await.ok()?;
                tokio::time::timeout(ORDERLY, machine.end()).await.ok()
            };
            let orderly = tokio::select! {
                end = tokio::time::timeout(patience, orderly) => end.ok().flatten(),
                end = machine.end() => Some(end),
            };
            if orderly.is_none() {
                warn!(self.log, "the guest did not end by itself; ending it");
            }
        }
        machine.kill();
        machine.end().await;
        self.network.end().await;
        self.files.kill();
        self.files.end().await;
        // Unmounts what containers had: nobody holds it any more.
        let left: Vec<_> = lock(&self.containers).drain().collect();
        let left = left.into_iter().map(|(id, slot)| self.clear_up(id, slot));
        futures::future::join_all(left).await;
        let place = lock(&self.place).take();
        if let Some(place) = place {
            place.clear(&self.log).await;
        }
        info!(self.log, "sandbox ended");
    }

    /// Clears up on the host after a container whose machine has ended.
    async fn clear_up(&self, id: String, slot: Slot) {
        let Slot::Created(container) = slot else { return };
        // The machine has ended, which every process tells as its exit.
        let _ = tokio::time::timeout(ORDERLY, container.init().exited()).await;
        if let Err(error) = container.delete().await {
            warn!(self.log, "container not cleared up"; "container" => id, "error" => %error);
        }
    }

    /// Without its files a guest can do nothing: the machine ends with its file server.
    async fn watch_files(self: Arc<Self>) {
        let machine = Arc::clone(&self.follower.machine);
        tokio::select! {
            how = self.files.end() => {
                if machine.ended().is_none() {
                    warn!(self.log, "{how}; ending the machine");
                    machine.kill();
                }
            }
            _ = machine.end() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containers_use_is_added_up() {
        let counter = |count| HashMap::from([("usage_usec".to_owned(), count)]);
        let disk = |minor, count| DiskUse {
            major: 8,
            minor,
            counters: HashMap::from([("rbytes".to_owned(), count)]),
            ..DiskUse::default()
        };
        let used = |count: u64, minor| Statistics {
            cpu_stat: counter(count),
            memory_current: count,
            memory_max: 5,
            io_stat: vec![disk(0, count), disk(minor, 1)],
            ..Statistics::default()
        };
        let mut sum = Statistics { memory_max: u64::MAX, ..Statistics::default() };
        add(&mut sum, used(3, 1));
        add(&mut sum, used(u64::MAX, 2));
        assert_eq!(sum.cpu_stat["usage_usec"], u64::MAX);
        assert_eq!((sum.memory_current, sum.memory_max), (u64::MAX, u64::MAX));
        let disks: Vec<_> =
            sum.io_stat.iter().map(|disk| (disk.minor, disk.counters["rbytes"])).collect();
        assert_eq!(disks, [(0, u64::MAX), (1, 1), (2, 1)]);
    }
}
