//! Events to containerd, in their order, without ever blocking whoever has one to tell.
//!
//! One task sends them; a send that fails is tried again on a new connection, for a while.

use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context::with_duration;
use protobuf::MessageDyn;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use slog::{Logger, warn};
use tokio::sync::{mpsc, oneshot};

use crate::address::socket_path;

/// How often one event is tried, a second apart.
const TRIES: u32 = 5;

/// How long containerd may take to accept one.
const DEADLINE: Duration = Duration::from_secs(5);

/// A message that containerd publishes under a topic of its own.
pub trait Event: MessageDyn {
    /// The topic, by which containerd and its clients filter.
    const TOPIC: &str;
}

macro_rules! events {
    ($($message:ty => $topic:literal),* $(,)?) => {
        $(impl Event for $message {
            const TOPIC: &str = $topic;
        })*
    };
}

events! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
    TaskOOM => "/tasks/oom",
    TaskExit => "/tasks/exit",
    TaskDelete => "/tasks/delete",
}

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Tells containerd what happens. Clones share one queue.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    /// To the daemon at `address`; it need not be up now.
    pub fn new(address: &str, namespace: &str, log: Logger) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        let address = format!("unix://{}", socket_path(address).display());
        tokio::spawn(run(address, items, log));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event.
    pub fn publish<E: Event>(&self, event: E) {
        let descriptor = event.descriptor_dyn();
        let mut any = Any::new();
        descriptor.full_name().clone_into(&mut any.type_url);
        // Cannot fail: the messages have no required fields.
        let event_dyn: &dyn MessageDyn = &event;
        let _ = event_dyn.write_to_vec_dyn(&mut any.value);
        let envelope = Envelope {
            timestamp: Some(Timestamp::now()).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(any).into(),
            ..Envelope::default()
        };
        // The task lives as long as the process.
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until everything queued so far has been sent or given up.
    pub async fn flush(&self) {
        let (done, waiting) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = waiting.await;
        }
    }
}

async fn run(address: String, mut items: mpsc::UnboundedReceiver<Item>, log: Logger) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Event(envelope) => send(&address, &mut client, *envelope, &log).await,
        }
    }
}

async fn send(address: &str, client: &mut Option<EventsClient>, envelope: Envelope, log: &Logger) {
    let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
    let mut last = String::new();
    for attempt in 0..TRIES {
        if attempt > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let sent = async {
            let open = match client.take() {
                Some(open) => open,
                None => EventsClient::new(Client::connect(address).await?),
            };
            open.forward(with_duration(DEADLINE), &request).await?;
            Ok::<_, containerd_shim_protos::ttrpc::Error>(open)
        };
        match sent.await {
            Ok(open) => {
                *client = Some(open);
                return;
            }
            Err(error) => last = error.to_string(),
        }
    }
    warn!(log, "event lost"; "topic" => request.envelope.topic.as_str(), "error" => last);
}
