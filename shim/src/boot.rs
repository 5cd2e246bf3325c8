//! Boots the sandbox, once: at the shim's start for the container in whose bundle it was started, or
//! when a client asks for a sandbox.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_configuration::{Configuration, ConfigurationError};
use husk_runtime::apart;
use husk_runtime::container::HostMounts;
use husk_runtime::sandbox::{Sandbox, SandboxError, SandboxRequest};
use slog::{Logger, error};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::error;
use crate::service::Announcer;

/// What came of booting the sandbox; none while it boots.
pub type Booted = Option<Result<Arc<Sandbox>, Arc<SandboxError>>>;

/// What is known of a sandbox before anyone has said what it is to be.
#[derive(Debug)]
pub struct Blank {
    /// containerd's namespace.
    pub namespace: String,
    /// Its name.
    pub id: String,
    /// The shim's.
    pub socket: PathBuf,
    /// The settings.
    pub configuration: Result<Configuration, ConfigurationError>,
    /// Where hooks run.
    pub mounts: HostMounts,
}

/// How long a sandbox that is given up may take to end: its two processes are killed.
const GIVING_UP: Duration = Duration::from_secs(30);

/// Boots one sandbox.
pub struct Booter {
    id: String,
    announcer: Arc<Announcer>,
    log: Logger,
    blank: Mutex<Option<(Blank, watch::Sender<Booted>)>>,
    booting: Mutex<Option<(JoinHandle<()>, Arc<Notify>)>>,
}

impl Booter {
    /// For the sandbox that is to come of `blank`.
    pub fn new(
        blank: Blank,
        announcer: Arc<Announcer>,
        log: Logger,
    ) -> (Self, watch::Receiver<Booted>) {
        let (sender, receiver) = watch::channel(Some(Err(Arc::new(SandboxError::Unasked))));
        let id = blank.id.clone();
        let (blank, booting) = (Mutex::new(Some((blank, sender))), Mutex::new(None));
        (Self { id, announcer, log, blank, booting }, receiver)
    }

    /// The sandbox's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Begins to boot what `make` asks for, which may read files: it runs in a thread of its own. False if that
    /// has been done before.
    pub fn begin(
        &self,
        make: impl FnOnce(Blank) -> Result<SandboxRequest, SandboxError> + Send + 'static,
    ) -> bool {
        let Some((blank, booted)) = lock(&self.blank).take() else { return false };
        booted.send_replace(None);
        let announcer = Arc::clone(&self.announcer);
        let log = self.log.clone();
        let given_up = Arc::new(Notify::new());
        let told = Arc::clone(&given_up);
        let booting = tokio::spawn(async move {
            let request = apart::opened(move || Ok(make(blank))).await;
            let result = match request.map_err(SandboxError::Read).flatten() {
                Ok(request) => Sandbox::create(request, announcer, told.notified(), &log).await,
                Err(error) => Err(error),
            };
            if let Err(error) = &result {
                error!(log, "no sandbox: {}", error::chain(error));
            }
            booted.send_replace(Some(result.map_err(Arc::new)));
        });
        *lock(&self.booting) = Some((booting, given_up));
        true
    }

    /// A sandbox that still boots is nobody's any more: ends its processes and removes what it has on the
    /// host, in this order.
    pub async fn give_up(&self) {
        let booting = lock(&self.booting).take();
        if let Some((mut booting, given_up)) = booting {
            given_up.notify_one();
            if tokio::time::timeout(GIVING_UP, &mut booting).await.is_err() {
                booting.abort();
                let _ = booting.await;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
