//! The border: the pod that a client of the sandbox service describes, as the sandbox it is to be.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use husk_runtime::machine::NetworkNamespace;
use husk_runtime::resource::Limits;
use husk_runtime::sandbox::{EtcFiles, SandboxError, SandboxRequest};
use husk_runtime::spec::{Membership, is_sandbox_sysctl};
use husk_runtime::state;
use prost::Message;

use crate::boot::Blank;
use crate::error::ServiceError;

/// OOM score adjustment that containerd gives a pause container.
const PAUSE_SCORE: i32 = -998;

/// How containerd names the message in `options`, with whatever comes before it.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// As much of the CRI's `PodSandboxConfig` as the sandbox is made from.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Pod {
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns: Option<Dns>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, Message)]
struct Dns {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

/// `LinuxContainerResources`.
#[derive(Clone, PartialEq, Message)]
struct Resources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory_limit: i64,
}

impl Pod {
    /// What `request` describes, if it has options.
    pub(super) fn of(request: &CreateSandboxRequest) -> Result<Option<Self>, ServiceError> {
        let mut pod = match request.options.as_ref() {
            None => return Ok(None),
            Some(any) if any.type_url.is_empty() && any.value.is_empty() => return Ok(None),
            Some(any) if any.type_url.ends_with(TYPE) => Self::decode(any.value.as_slice())
                .map_err(|error| ServiceError::Invalid(format!("the options' {TYPE}: {error}")))?,
            Some(any) => {
                let reason = format!("the options are a {:?}, not a {TYPE}", any.type_url);
                return Err(ServiceError::Invalid(reason));
            }
        };
        pod.annotations.extend(request.annotations.clone());
        pod.check()?;
        Ok(Some(pod))
    }

    fn check(&self) -> Result<(), ServiceError> {
        let sysctls = self.linux.iter().flat_map(|linux| linux.sysctls.keys());
        for name in sysctls {
            if !is_sandbox_sysctl(name, Membership::Sandbox) {
                let reason = format!(
                    "kernel parameter {name} belongs to neither network, IPC nor host name"
                );
                return Err(ServiceError::Invalid(reason));
            }
        }
        let dns = self.dns.iter();
        let lines = dns.flat_map(|dns| [&dns.servers, &dns.searches, &dns.options]).flatten();
        for word in lines.chain([&self.hostname]) {
            if word.chars().any(char::is_control) {
                return Err(ServiceError::Invalid(format!("{word:?} in the pod's names")));
            }
        }
        Ok(())
    }

    /// The sandbox for it, in the network namespace at the path `network` if that is not empty.
    pub(super) fn request(
        self,
        blank: Blank,
        network: &str,
    ) -> Result<SandboxRequest, SandboxError> {
        let linux = self.linux.clone().unwrap_or_default();
        let pod_limits = linux.resources.as_ref().map(Resources::limits).unwrap_or_default();
        let etc = self.etc()?;
        Ok(SandboxRequest {
            root: state::ROOT.into(),
            hostname: self.hostname,
            configuration: blank.configuration?,
            annotations: self.annotations.into_iter().collect::<BTreeMap<_, _>>(),
            sysctls: linux.sysctls.into_iter().collect(),
            cgroup: Some(cgroup(&linux.cgroup_parent, &blank.namespace, &blank.id)),
            network: match network {
                "" => NetworkNamespace::Inherited,
                path => NetworkNamespace::At(path.into()),
            },
            resolver: false,
            limits: Limits::default(),
            pod_limits,
            mounts: blank.mounts,
            shared_memory: 0,
            immutable_flags: false,
            etc: Some(etc),
            oom_score: Some(PAUSE_SCORE),
            namespace: blank.namespace,
            id: blank.id,
            socket: Some(blank.socket),
        })
    }

    /// What engines lay out for a pod: the host's, but for what the pod says itself.
    fn etc(&self) -> Result<EtcFiles, SandboxError> {
        let name = match self.hostname.as_str() {
            "" => nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned(),
            name => name.to_owned(),
        };
        let resolv = match self.dns.as_ref().map(Dns::text).filter(|text| !text.is_empty()) {
            Some(text) => text,
            None => host_file(Path::new("/etc/resolv.conf"))?,
        };
        Ok(EtcFiles(vec![
            ("hostname", format!("{name}\n")),
            ("hosts", host_file(Path::new("/etc/hosts"))?),
            ("resolv.conf", resolv),
        ]))
    }
}

impl Dns {
    /// As resolv.conf(5) has it.
    fn text(&self) -> String {
        let mut text = String::new();
        if !self.searches.is_empty() {
            text += &format!("search {}\n", self.searches.join(" "));
        }
        for server in &self.servers {
            text += &format!("nameserver {server}\n");
        }
        if !self.options.is_empty() {
            text += &format!("options {}\n", self.options.join(" "));
        }
        text
    }
}

impl Resources {
    fn limits(&self) -> Limits {
        let period = u64::try_from(self.cpu_period).ok();
        Limits::new(Some(self.memory_limit), Some(self.cpu_quota), period)
    }
}

fn host_file(path: &Path) -> Result<String, SandboxError> {
    match std::fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(SandboxError::Folder { path: path.to_path_buf(), source }),
    }
}

/// The name of the sandbox's cgroup, as containerd gives it to a pause container: in the form of
/// either cgroup driver.
fn cgroup(parent: &str, namespace: &str, id: &str) -> String {
    match parent {
        "" => format!("/{namespace}/{id}"),
        parent if parent.ends_with(".slice") => {
            let slice = parent.rsplit('/').next().unwrap_or(parent);
            format!("{slice}:cri-containerd:{id}")
        }
        parent => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use husk_configuration::Configuration;
    use husk_runtime::container::HostMounts;

    fn pod() -> Pod {
        Pod {
            hostname: "web".to_owned(),
            dns: Some(Dns {
                servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
                searches: vec!["a.b".to_owned(), "c".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            linux: Some(LinuxPod {
                cgroup_parent: "/kubepods/pod1".to_owned(),
                sysctls: [("net.core.somaxconn".to_owned(), "9".to_owned())].into(),
                resources: Some(Resources {
                    cpu_period: 100_000,
                    cpu_quota: 150_000,
                    memory_limit: 1 << 29,
                }),
            }),
        }
    }

    fn asked(type_url: &str, value: Vec<u8>) -> Result<Pod, ServiceError> {
        let any = Any { type_url: type_url.to_owned(), value, ..Any::default() };
        let annotations = [("more".to_owned(), "c".to_owned())].into();
        let pod = Pod::of(&CreateSandboxRequest {
            options: Some(any).into(),
            annotations,
            ..CreateSandboxRequest::default()
        });
        Ok(pod?.unwrap())
    }

    fn blank() -> Blank {
        Blank {
            namespace: "k8s.io".to_owned(),
            id: "x".to_owned(),
            socket: "/s".into(),
            configuration: Ok(Configuration::default()),
            mounts: HostMounts::default(),
        }
    }

    #[test]
    fn a_pod_becomes_a_sandbox() {
        for url in [TYPE, "type.googleapis.com/runtime.v1.PodSandboxConfig"] {
            let pod = asked(url, pod().encode_to_vec()).unwrap();
            let request = pod.request(blank(), "/run/netns/n").unwrap();
            assert_eq!((request.hostname.as_str(), request.id.as_str()), ("web", "x"));
            assert_eq!((request.annotations["a"].as_str(), request.annotations.len()), ("b", 2));
            assert_eq!(request.sysctls["net.core.somaxconn"], "9");
            assert_eq!(request.cgroup.as_deref(), Some("/kubepods/pod1/x"));
            assert_eq!(request.network, NetworkNamespace::At("/run/netns/n".into()));
            let limits = Limits::new(Some(1 << 29), Some(150_000), Some(100_000));
            assert_eq!(request.pod_limits, limits);
            let etc = request.etc.unwrap().0;
            assert_eq!(etc[0], ("hostname", "web\n".to_owned()));
            let resolv =
                "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
            assert_eq!(etc[2], ("resolv.conf", resolv.to_owned()));
        }
    }

    #[test]
    fn what_is_not_said_is_the_hosts() {
        assert_eq!(Pod::of(&CreateSandboxRequest::default()).unwrap(), None);
        let request = Pod::default().request(blank(), "").unwrap();
        assert_eq!(request.network, NetworkNamespace::Inherited);
        assert_eq!(request.cgroup.as_deref(), Some("/k8s.io/x"));
        assert_eq!(request.pod_limits, Limits::default());
        let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        assert_eq!(request.etc.unwrap().0[2].1, host);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refusal = |result: Result<Pod, ServiceError>| result.unwrap_err().to_string();
        assert!(refusal(asked("some.Other", Vec::new())).contains("some.Other"));
        assert!(refusal(asked(TYPE, vec![0xff])).contains(TYPE));
        let mut odd = pod();
        odd.linux.as_mut().unwrap().sysctls.insert("vm.overcommit".to_owned(), "1".to_owned());
        assert!(refusal(asked(TYPE, odd.encode_to_vec())).contains("vm.overcommit"));
        let mut odd = pod();
        odd.dns.as_mut().unwrap().servers.push("1.1.1.1\nsearch x".to_owned());
        assert!(refusal(asked(TYPE, odd.encode_to_vec())).contains("search x"));
    }

    #[test]
    fn cgroups_are_named_as_a_pause_containers_are() {
        for (parent, name) in [
            ("", "/ns/x"),
            ("/kubepods/pod1/", "/kubepods/pod1/x"),
            ("/kubepods.slice/kubepods-pod1.slice", "kubepods-pod1.slice:cri-containerd:x"),
        ] {
            assert_eq!(cgroup(parent, "ns", "x"), name);
        }
    }
}
