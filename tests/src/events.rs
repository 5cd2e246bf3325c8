//! containerd's events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use containerd_client::types::Envelope;

use crate::client::{SOCKET, call, named};
use crate::wait::{PATIENCE, until_true};

/// Events that containerd has published of a container.
#[derive(Debug, Clone)]
pub struct Event {
    /// The kind.
    pub topic: String,
    /// The container's id.
    pub id: String,
}

/// containerd's events as they come.
#[derive(Debug)]
pub struct Events {
    ended: Arc<AtomicBool>,
    follower: Option<JoinHandle<Result<()>>>,
    events: Receiver<Event>,
}

/// The topic of the event that shows that a subscription stands.
const MARK: &str = "/husk-tests/mark";

impl Events {
    /// Follows from now on.
    pub fn follow() -> Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ended);
        let (sender, events) = channel();
        let follower = std::thread::spawn(move || follow(&sender, &told));
        let following = Self { ended, follower: Some(follower), events };
        // The subscription has no answer; an event of our own shows that it stands.
        until_true("events come", PATIENCE, || {
            let mark = PublishRequest { topic: MARK.to_owned(), event: Some(Default::default()) };
            let request = named(mark, "default")?;
            call(|channel| async move { EventsClient::new(channel).publish(request).await })?;
            Ok(following.events.recv_timeout(Duration::from_millis(200)).is_ok())
        })?;
        Ok(following)
    }

    /// The topics of the events of a container's task up to the last one wanted.
    pub fn until(&mut self, id: &str, last: &str) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        loop {
            let Ok(event) = self.events.recv_timeout(PATIENCE) else {
                bail!("no {last} after {seen:?}")
            };
            if event.id != id || !event.topic.starts_with("/tasks/") {
                continue;
            }
            let ended = event.topic == last;
            seen.push(event.topic);
            if ended {
                return Ok(seen);
            }
        }
    }

    /// The events that have come, and those that come within `patience`.
    pub fn within(&mut self, patience: Duration) -> Vec<Event> {
        let until = Instant::now() + patience;
        let mut seen = Vec::new();
        while let Ok(event) =
            self.events.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            seen.push(event);
        }
        seen
    }
}

/// Between two looks at whether to end.
const PAUSE: Duration = Duration::from_millis(100);

/// Passes events on until `ended` is set.
fn follow(sender: &Sender<Event>, ended: &AtomicBool) -> Result<()> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio.block_on(async {
        let channel = containerd_client::connect(SOCKET).await.context("containerd")?;
        let request = SubscribeRequest { filters: Vec::new() };
        let mut stream = EventsClient::new(channel).subscribe(request).await?.into_inner();
        while !ended.load(Ordering::Relaxed) {
            let Ok(message) = tokio::time::timeout(PAUSE, stream.message()).await else { continue };
            let Some(envelope) = message? else { break };
            if sender.send(event(&envelope)).is_err() {
                break;
            }
        }
        Ok(())
    })
}

/// Reads the id from a task's event: the first field of each kind of them.
fn event(envelope: &Envelope) -> Event {
    let value = envelope.event.as_ref().map(|event| &event.value[..]).unwrap_or_default();
    let id = match value {
        [0x0a, length, rest @ ..] => rest.get(..usize::from(*length)).unwrap_or_default(),
        _ => &[],
    };
    Event { topic: envelope.topic.clone(), id: String::from_utf8_lossy(id).into_owned() }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.follower.take().map(JoinHandle::join);
    }
}
