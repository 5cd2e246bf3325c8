//! A network namespace and a netlink socket in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::filter;
use crate::apart::apart;

/// Whose changes are of interest.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
];

/// Why the network of a sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace.
    #[error("the sandbox's network namespace")]
    Namespace(#[source] io::Error),
    /// The kernel refused.
    #[error("{what}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// The refusal.
        #[source]
        source: rtnetlink::Error,
    },
    /// A tap.
    #[error("cannot make a tap; load the module tun and run the engine as root")]
    Tap(#[source] io::Error),
    /// Someone else's rules are where ours would go.
    #[error("it has an ingress queueing discipline already")]
    Occupied,
    /// The packet filter's rules cannot be listed.
    #[error("cannot list the packet filter rules of the sandbox's network namespace")]
    Rules(#[source] io::Error),
    /// The guest could not be told of packet filter rules that have changed.
    #[error("cannot tell the guest the packet filter rules of the sandbox's network namespace")]
    RulesNotTold(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Rules in the namespace that the guest's packets would pass by, and that the guest cannot carry out.
    #[error(
        "cannot carry out the {rule}{others} of the sandbox's network namespace in the guest: {reason}. Remove it \
         (for a service mesh, exclude the pod from its CNI plugin), or set network.ignore_rules = true in \
         husk.toml to run without it"
    )]
    NotCarriedOut {
        /// The first of them.
        rule: String,
        /// How many others there are, as text.
        others: String,
        /// The reason for the first.
        reason: String,
    },
}

impl NetworkError {
    /// As the error of trying `what`.
    pub(crate) fn netlink(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |source| Self::Netlink { what, source }
    }
}

type Events = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// A network namespace, held open, and a netlink socket in it.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    handle: Handle,
    events: Mutex<Events>,
    filter: Option<filter::Watch>,
    socket: AbortHandle,
}

impl Namespace {
    /// The one at `path`, which may be of `/proc/<pid>/ns/net`.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let file = File::open(path).map_err(NetworkError::Namespace)?;
        let runtime = tokio::runtime::Handle::current();
        let connected = apart(|| {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            // The socket stays in the namespace it is made in, whoever drives it.
            let _entered = runtime.enter();
            let connected = rtnetlink::new_multicast_connection(&GROUPS)?;
            // A kernel without nftables has no news of it.
            Ok::<_, io::Error>((connected, filter::Watch::open().ok()))
        });
        let ((connection, handle, events), filter) = connected.map_err(NetworkError::Namespace)?;
        let socket = tokio::spawn(connection).abort_handle();
        Ok(Self { file, handle, events: Mutex::new(events), filter, socket })
    }

    /// For requests in the namespace.
    pub fn netlink(&self) -> &Handle {
        &self.handle
    }

    /// Does `work` in the namespace.
    pub(super) fn within<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        apart(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            work()
        })
    }

    /// Waits until something has changed; false when nothing more will be heard.
    pub async fn changed(&self) -> bool {
        let mut events = self.events.lock().await;
        let filter = async {
            match &self.filter {
                Some(filter) if filter.changed().await => {}
                // The rest is still told.
                _ => std::future::pending().await,
            }
        };
        let heard = tokio::select! {
            event = events.next() => event.is_some(),
            () = filter => true,
        };
        // One look at what there is serves all that has come by then.
        while events.try_recv().is_ok() {}
        heard
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.socket.abort();
    }
}
