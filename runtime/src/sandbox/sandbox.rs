//! A running sandbox.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_control::MachineRequest;
use slog::{Logger, info, warn};

use super::create::Place;
use crate::container::{Container, ContainerError, CreateRequest, Exit, Follower};
use crate::lock::lock;
use crate::machine::FileServer;

/// How long the guest may take to answer that it is ending, and then to end.
const ORDERLY: Duration = Duration::from_secs(2);

/// A running sandbox.
pub struct Sandbox {
    follower: Follower,
    files: FileServer,
    place: Mutex<Option<Place>>,
    containers: Mutex<HashMap<String, Slot>>,
    log: Logger,
}

/// A name is taken from the moment its creation begins.
enum Slot {
    Creating,
    Created(Arc<Container>),
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sandbox")
    }
}

impl Sandbox {
    pub(super) fn new(
        follower: Follower,
        files: FileServer,
        place: Place,
        log: &Logger,
    ) -> Arc<Self> {
        let sandbox = Arc::new(Self {
            follower,
            files,
            place: Mutex::new(Some(place)),
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

    /// Creates a container.
    pub async fn create_container(
        &self,
        request: CreateRequest,
    ) -> Result<Arc<Container>, ContainerError> {
        let id = request.id.clone();
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(ContainerError::Exists(id));
            }
            containers.insert(id.clone(), Slot::Creating);
        }
        let place = lock(&self.place).as_ref().map(Place::parts);
        let created = match place {
            Some((share, volumes)) => {
                Container::create(request, &share, &volumes, self.follower.clone()).await
            }
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
                Err(error)
            }
        }
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
        Ok(exit)
    }

    /// Whether no container is left.
    pub fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// Ends the machine, in order if containers still run, and removes everything. Can be called again.
    pub async fn stop(&self) {
        let machine = &self.follower.machine;
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
                end = orderly => end,
                end = machine.end() => Some(end),
            };
            if orderly.is_none() {
                warn!(self.log, "the guest did not end by itself; ending it");
            }
        }
        machine.kill();
        machine.end().await;
        self.files.kill();
        self.files.end().await;
        // Unmounts what containers had: nobody holds it any more.
        let left: Vec<_> = lock(&self.containers).drain().collect();
        for (id, slot) in left {
            if let Slot::Created(container) = slot {
                // The machine has ended, so this only clears up on the host.
                if let Err(error) = container.delete().await {
                    warn!(self.log, "container not cleared up"; "container" => id,
                        "error" => %error);
                }
            }
        }
        drop(lock(&self.place).take());
        info!(self.log, "sandbox ended");
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
