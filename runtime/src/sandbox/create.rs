//! From nothing to a sandbox whose agent is ready.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_agent_protocols::AGENT_PORT;
use husk_agent_protocols::agent::{FilterRefusal, NetworkState, StartSandboxRequest};
use husk_configuration::Configuration;
use husk_control::{MachineRequest, VolumeRules};
use oci_spec::runtime::Spec;
use slog::{Logger, info, warn};
use tokio::net::UnixStream;

use super::boot::{BootParts, SHARE_TAG, last_words};
use super::cpusets::Cpusets;
use super::etc::WrittenEtc;
use super::network::{SandboxNetwork, check_namespace};
use super::oom_scores::OomScores;
use super::{EtcFiles, Sandbox, SandboxError};
use crate::agent_client::{AgentClient, AgentError, sanitize};
use crate::apart::{CLEAR, Purpose, alongside_within};
use crate::container::{Follower, HostMounts, Observer, SizePlan};
use crate::machine::{FileServer, Machine, MachineError, NetworkNamespace, Program};
use crate::resource::{
    CgroupError, Cpuset, Folder, HostCgroup, Limits, Share, SizingRules, Sources, VOLUMES, Volumes,
};
use crate::shell::ShellDoor;
use crate::state::{ProcessRecord, Record, sandbox_folder};

/// Bytes of the host's randomness for the guest's pool.
const ENTROPY: usize = 64;

/// A sandbox to be created.
#[derive(Debug, Clone)]
pub struct SandboxRequest {
    /// Where sandboxes have their folders; [`crate::state::ROOT`] but for tests.
    pub root: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// Its name.
    pub id: String,
    /// The guest's host name; empty for the host's.
    pub hostname: String,
    /// The settings.
    pub configuration: Configuration,
    /// Annotations of the container that brings the sandbox about.
    pub annotations: BTreeMap<String, String>,
    /// Parameters of what is the sandbox's.
    pub sysctls: BTreeMap<String, String>,
    /// Bytes of the memory that the containers of a pod share; 0 for the default.
    pub shared_memory: u64,
    /// What its containers find in `/etc`, if that is not laid out by whoever starts them.
    pub etc: Option<EtcFiles>,
    /// Where its processes are counted on the host, as the spec's `cgroupsPath` says it.
    pub cgroup: Option<String>,
    /// The network namespace of the machine's process.
    pub network: NetworkNamespace,
    /// Whether an engine's name server may answer in that namespace, at 127.0.0.11.
    pub resolver: bool,
    /// What its first container may use, to size the machine by.
    pub limits: Limits,
    /// What all of its containers may use together, if it is a pod for which that is said.
    pub pod_limits: Limits,
    /// How soon the host's OOM killer takes its processes while there is no other container; `None` for
    /// what the shim has.
    pub oom_score: Option<i32>,
    /// Whether its first container has `CAP_LINUX_IMMUTABLE`, for files on volumes.
    pub immutable_flags: bool,
    /// Where hooks run.
    pub mounts: HostMounts,
    /// The shim's socket, for the record.
    pub socket: Option<PathBuf>,
}

/// The sandbox's place on the host; dropping removes it.
#[derive(Debug)]
pub(super) struct Place {
    // In the order of dropping.
    volumes: Arc<Volumes>,
    etc: Option<WrittenEtc>,
    share: Arc<Share>,
    folder: Folder,
    namespace: PathBuf,
    root: PathBuf,
    cgroup: Option<HostCgroup>,
    cpusets: Cpusets,
}

impl Place {
    fn create(request: &SandboxRequest) -> Result<Self, SandboxError> {
        let path = sandbox_folder(&request.root, &request.namespace, &request.id);
        let namespace = request.root.join(&request.namespace);
        let make = |path: &Path, result: io::Result<Folder>| {
            result.map_err(|source| SandboxError::Folder { path: path.to_path_buf(), source })
        };
        // Another sandbox's end may take the outer folders away between the two steps.
        let folder = loop {
            std::fs::create_dir_all(&namespace)
                .map_err(|source| SandboxError::Folder { path: namespace.clone(), source })?;
            match Folder::create(path.clone()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => break make(&path, result)?,
            }
        };
        // What is mounted there is in the shim's mount namespace only.
        let etc = path.join("etc");
        let sources = Sources::new(request.mounts.clone(), etc.clone());
        let share = Share::create(path.join("share"), sources)?;
        let volumes = Arc::new(Volumes::create(&share)?);
        let root = request.root.clone();
        let cpusets = Cpusets::new(&request.id);
        let mut place =
            Self { volumes, etc: None, share, folder, namespace, root, cgroup: None, cpusets };
        if let Some(files) = &request.etc {
            place.etc = Some(WrittenEtc::write(etc, files)?);
        }
        let name = request.cgroup.as_deref().filter(|name| !name.is_empty());
        place.cgroup = name.map(HostCgroup::of).transpose()?;
        // Before there is anything to clear up.
        place.write_record(request, &[])?;
        if let Some(cgroup) = &place.cgroup {
            cgroup.enter()?;
        }
        Ok(place)
    }

    /// Writes down what has to be known to clear up, should this process be gone then.
    fn write_record(&self, request: &SandboxRequest, others: &[u32]) -> Result<(), SandboxError> {
        let pids = others.iter().copied().chain([std::process::id()]);
        let processes = pids.filter_map(ProcessRecord::of).collect();
        let cgroups = self.cgroup.as_ref().map(HostCgroup::folders).unwrap_or_default();
        let network = match &request.network {
            NetworkNamespace::At(path) => Some(path.clone()),
            // One of the machine's own goes with it.
            NetworkNamespace::New | NetworkNamespace::Inherited => None,
        };
        let socket = request.socket.clone();
        Record { processes, socket, cgroups, network }.write(self.path())?;
        Ok(())
    }

    /// Where containers lay out their files, and the volumes they share.
    pub(super) fn parts(&self) -> (Arc<Share>, Arc<Volumes>) {
        (Arc::clone(&self.share), Arc::clone(&self.volumes))
    }

    /// Adds to a container's spec what the sandbox lays out for its containers.
    pub(super) fn complete(&self, id: &str, spec: &mut Spec) {
        if let Some(etc) = &self.etc {
            etc.complete(id, spec);
        }
    }

    /// Returns the CPUs and memory nodes that a container may use.
    pub(super) fn cpuset(&self, id: &str) -> Option<Cpuset> {
        self.cpusets.get(id)
    }

    /// Lets the sandbox run on what its containers may use together, now that the container `id` may use
    /// `set` or has gone. A set that cannot be had counts for nothing.
    pub(super) fn confine(&self, id: &str, set: Option<Cpuset>) -> Result<(), CgroupError> {
        let before = self.cpusets.get(id);
        let (Some(cgroup), Some(together)) = (&self.cgroup, self.cpusets.put(id, set)) else {
            return Ok(());
        };
        cgroup.confine(&together).inspect_err(|_| {
            self.cpusets.put(id, before);
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes everything. File systems that do not let go of what was mounted in time are left to a thread:
    /// their mounts are detached all the same.
    pub(super) async fn clear(self, log: &Logger) {
        let share = Arc::clone(&self.share);
        let unmounted = alongside_within(Purpose::Clear, CLEAR, move || share.unmount()).await;
        if let Err(error) = unmounted {
            warn!(log, "the shared folder is not unmounted yet"; "error" => %error);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        Record::remove(self.path());
        let _ = std::fs::remove_file(self.path().join("console.log"));
        drop(self.etc.take());
        // Whoever still holds a container holds no mount of it any more.
        self.share.unmount();
        // Fields are dropped after this; removing twice does no harm.
        let _ = std::fs::remove_dir(self.share.path());
        let _ = std::fs::remove_dir(self.path());
        let _ = std::fs::remove_dir(&self.namespace);
        let _ = std::fs::remove_dir(&self.root);
    }
}

impl Sandbox {
    /// Creates a sandbox and waits until its agent is ready, or until `given_up` ends: then what has been
    /// made is ended in order, as after any other failure.
    pub async fn create(
        request: SandboxRequest,
        observer: Arc<dyn Observer>,
        given_up: impl Future<Output = ()>,
        log: &Logger,
    ) -> Result<Arc<Self>, SandboxError> {
        let configuration = request.configuration.clone().with_annotations(&request.annotations)?;
        let program = Program {
            path: configuration.vmm_program()?,
            accept_missing: &configuration.machine.accept_missing,
        };
        check_namespace(&request.network)?;
        let place = Place::create(&request)?;
        let rules = SizingRules::new(&configuration, request.pod_limits);
        let plan = SizePlan { booted: rules.size([&request.limits]), rules };
        let (mut parts, channels) = BootParts::open(&configuration, &plan, place.path())?;
        let machine = Arc::new(
            Machine::start(program, &request.network, log).map_err(SandboxError::Machine)?,
        );
        let network = SandboxNetwork::open(&machine, &configuration.network, parts.vcpus(), log);
        let network = Arc::new(network.map_err(SandboxError::Network)?);
        // Outside, so that it can be waited for whatever fails.
        let served = OnceLock::new();
        let sandbox = async {
            let laid = network.at_boot().await.map_err(SandboxError::Network)?;
            let laid = parts.connect(laid);
            let share = place.share.open().map_err(|errno| SandboxError::Folder {
                path: place.share.path().to_owned(),
                source: errno.into(),
            })?;
            let limit = Duration::from_secs(configuration.machine.start_timeout.into());
            let serving = async {
                let files = FileServer::start(
                    program,
                    share.as_fd(),
                    &channels,
                    VolumeRules {
                        folder: VOLUMES.to_owned(),
                        immutable_flags: request.immutable_flags,
                    },
                    limit,
                    log,
                )
                .await;
                let files = Arc::new(files.map_err(SandboxError::Machine)?);
                Ok(Arc::clone(served.get_or_init(|| files)))
            };
            let (agent, files) = tokio::try_join!(boot(&machine, &parts, &configuration), serving)?;
            place.write_record(&request, &[machine.pid(), files.pid()])?;
            let started = start_sandbox(&agent, &request, laid);
            let started = lost_or(&machine, &parts, started).await?;
            let (release, refused, filter) = started.map_err(SandboxError::Agent)?;
            network.started(&refused, &filter).await.map_err(SandboxError::Network)?;
            info!(log, "sandbox ready"; "guest" => release);
            Ok((agent, files))
        };
        let made = tokio::select! {
            biased;
            () = given_up => Err(SandboxError::GivenUp),
            made = sandbox => made,
        };
        match made {
            Ok((agent, files)) => {
                let follower = Follower::new(
                    (&request.namespace, &request.id),
                    Arc::clone(&machine),
                    agent,
                    observer,
                    request.mounts,
                    plan,
                    log.clone(),
                );
                match request.network {
                    // In a namespace of the sandbox's own nobody can dial.
                    NetworkNamespace::At(_) => network.forward(follower.clone()),
                    NetworkNamespace::New if request.resolver => network.resolve(&follower).await,
                    NetworkNamespace::New | NetworkNamespace::Inherited => {}
                }
                let door = open_door(&configuration, &place, &follower, log);
                let (own, score) = (&request.id, request.oom_score);
                let scores = OomScores::new(own, score, &machine, &files, log);
                Ok(Sandbox::new(follower, files, place, network, door, scores, log))
            }
            Err(error) => {
                // Gone before the folder and the cgroup go, and before anyone hears of the error.
                machine.kill();
                machine.end().await;
                if let Some(files) = served.get() {
                    files.kill();
                    files.end().await;
                }
                network.end().await;
                place.clear(log).await;
                Err(error)
            }
        }
    }
}

/// Boots the machine and waits for the agent's call.
async fn boot(
    machine: &Machine,
    parts: &BootParts,
    configuration: &Configuration,
) -> Result<AgentClient, SandboxError> {
    let call = machine.listen_once(AGENT_PORT).await.map_err(SandboxError::Machine)?;
    let request = MachineRequest::Boot(Box::new(parts.config()));
    let booted = machine.request(request, &parts.descriptors()).await;
    booted.map_err(SandboxError::Machine)?;
    let seconds = configuration.machine.start_timeout;
    let limit = Duration::from_secs(seconds.into());
    let stream = match tokio::time::timeout(limit, call).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) => {
            let reason = machine.end().await.reason;
            return Err(SandboxError::Ended(reason + &last_words(parts.console_log.as_deref())));
        }
        Err(_) => {
            let console = last_words(parts.console_log.as_deref());
            return Err(SandboxError::Silent { seconds, console });
        }
    };
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map(AgentClient::new)
        .map_err(|source| SandboxError::Folder { path: "the agent's stream".into(), source })
}

/// The result of `call`, unless the machine ends before.
async fn lost_or<T>(
    machine: &Machine,
    parts: &BootParts,
    call: impl Future<Output = T>,
) -> Result<T, SandboxError> {
    tokio::select! {
        biased;
        result = call => Ok(result),
        end = machine.end() => {
            let reason = end.reason + &last_words(parts.console_log.as_deref());
            Err(SandboxError::Ended(reason))
        }
    }
}

async fn start_sandbox(
    agent: &AgentClient,
    request: &SandboxRequest,
    network: NetworkState,
) -> Result<(String, Vec<String>, Vec<FilterRefusal>), AgentError> {
    let mut call = StartSandboxRequest::new();
    call.sandbox_id.clone_from(&request.id);
    // Like under runc, where a container without a name of its own has the host's.
    call.hostname = match request.hostname.as_str() {
        "" => nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
        name => name.to_owned(),
    };
    SHARE_TAG.clone_into(&mut call.share_tag);
    husk_control::VALIDITY_ATTRIBUTE.clone_into(&mut call.validity_attribute);
    call.shared_memory = request.shared_memory;
    call.sysctls = request.sysctls.clone().into_iter().collect();
    call.entropy = entropy().unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    call.clock_nanoseconds = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    call.network = Some(network).into();
    let answer = agent.start_sandbox(&call).await?;
    Ok((answer.kernel_release, sanitize(&answer.network_refused), answer.filter_refused))
}

/// Where shells are asked for, if they are allowed. A sandbox does without rather than not at all.
fn open_door(
    configuration: &Configuration,
    place: &Place,
    follower: &Follower,
    log: &Logger,
) -> Option<ShellDoor> {
    if !configuration.guest.debug_shell {
        return None;
    }
    let door = ShellDoor::open(place.path(), follower.clone(), log);
    door.inspect_err(|error| warn!(log, "no door for shells"; "error" => %error)).ok()
}

fn entropy() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; ENTROPY];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl From<MachineError> for SandboxError {
    fn from(error: MachineError) -> Self {
        Self::Machine(error)
    }
}
