//! containerd's own records: which sandbox a container belongs to.
//!
//! Annotations are written by whoever makes a container. The record of the container is written by the
//! engine: the sandbox that it was created in (`ctr run --sandbox`, and the CRI with `sandboxer = "shim"`), or
//! the metadata that the CRI keeps beside each of its containers. Neither can be set by an annotation or by a
//! label. The messages are the part that is read of containerd.services.containers.v1.

use std::collections::HashMap;
use std::time::Duration;

use serde::Deserialize;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use crate::address::socket_path;

/// How long containerd may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

const GET: &str = "/containerd.services.containers.v1.Containers/Get";

/// Keys of the CRI's metadata, of containers and of sandboxes: the older name, which 1.6 to 2.1 use, and the newer.
const OF_CONTAINERS: [&str; 2] =
    ["io.cri-containerd.container.metadata", "io.containerd.cri.container.metadata"];
const OF_SANDBOXES: [&str; 2] =
    ["io.cri-containerd.sandbox.metadata", "io.containerd.cri.sandbox.metadata"];

/// The container may not join the sandbox that its annotation names.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// containerd's records do not place it there.
    #[error(
        "cannot join sandbox {sandbox}: containerd's record of container {container} does not place it there, \
         only an annotation does; create it in the sandbox (by the CRI, or `ctr run --sandbox` from containerd \
         1.7 on), or set annotations.join = true in husk.toml for sandboxes that the CRI did not make"
    )]
    Elsewhere {
        /// The container.
        container: String,
        /// The sandbox it names.
        sandbox: String,
    },
    /// containerd does not answer, or with an error.
    #[error("cannot ask containerd at {address} for its record of container {container}")]
    Ask {
        /// The daemon's address.
        address: String,
        /// The container.
        container: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetRequest {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetResponse {
    #[prost(message, optional, tag = "1")]
    container: Option<Record>,
}

/// containerd's record of a container.
#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(map = "string, message", tag = "10")]
    extensions: HashMap<String, Extension>,
    #[prost(string, tag = "11")]
    sandbox: String,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
struct Extension {
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// The CRI's metadata, as far as it is read.
#[derive(Deserialize)]
struct Versioned {
    #[serde(rename = "Metadata")]
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(rename = "SandboxID")]
    sandbox: String,
}

impl Record {
    /// Whether the engine put the container into `sandbox`.
    fn is_in(&self, sandbox: &str) -> bool {
        if !self.sandbox.is_empty() {
            return self.sandbox == sandbox;
        }
        let metadata = OF_CONTAINERS.iter().find_map(|key| self.extensions.get(*key));
        let versioned =
            metadata.and_then(|one| serde_json::from_slice::<Versioned>(&one.value).ok());
        versioned.is_some_and(|one| one.metadata.sandbox == sandbox)
    }

    /// Whether the CRI made it, as a pod's pause container or as one of a pod's.
    fn is_of_the_cri(&self) -> bool {
        let mut keys = OF_SANDBOXES.iter().chain(&OF_CONTAINERS);
        keys.any(|key| self.extensions.contains_key(*key))
    }
}

/// Returns an error unless containerd's records place `container` in `sandbox`. With `by_annotation` that the
/// container names it is enough, for a sandbox that is on record as a container which the CRI did not make.
pub fn check(
    address: &str,
    namespace: &str,
    container: &str,
    sandbox: &str,
    by_annotation: bool,
) -> Result<(), RecordsError> {
    let ask = |source| RecordsError::Ask {
        address: address.to_owned(),
        container: container.to_owned(),
        source,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| ask(error.into()))?;
    let allowed = runtime.block_on(async {
        let mut client = Client::connect(address, namespace).await?;
        if client.get(container).await?.is_some_and(|record| record.is_in(sandbox)) {
            return Ok(true);
        }
        let by_hand = by_annotation
            && client.get(sandbox).await?.is_some_and(|record| !record.is_of_the_cri());
        Ok(by_hand)
    });
    if allowed.map_err(ask)? {
        return Ok(());
    }
    Err(RecordsError::Elsewhere { container: container.to_owned(), sandbox: sandbox.to_owned() })
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// A connection to containerd.
struct Client {
    grpc: Grpc<Channel>,
    namespace: MetadataValue<Ascii>,
}

impl Client {
    async fn connect(address: &str, namespace: &str) -> Result<Self, Failed> {
        let path = socket_path(address);
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))?;
        let channel = endpoint.connect_timeout(DEADLINE).timeout(DEADLINE).connect().await?;
        Ok(Self { grpc: Grpc::new(channel), namespace: namespace.parse()? })
    }

    /// The record of the container `id`; `None` if there is none.
    async fn get(&mut self, id: &str) -> Result<Option<Record>, Failed> {
        self.grpc.ready().await?;
        let mut request = Request::new(GetRequest { id: id.to_owned() });
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        let codec = ProstCodec::<GetRequest, GetResponse>::default();
        match self.grpc.unary(request, PathAndQuery::from_static(GET), codec).await {
            Ok(response) => Ok(response.into_inner().container),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status.message().to_owned().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    fn record(sandbox: &str, extensions: &[(&str, &str)]) -> Record {
        let extension = |(key, text): &(&str, &str)| {
            ((*key).to_owned(), Extension { value: text.as_bytes().to_vec() })
        };
        let extensions = extensions.iter().map(extension).collect();
        Record { extensions, sandbox: sandbox.to_owned() }
    }

    #[test]
    fn the_record_says_where_a_container_is() {
        assert!(!record("", &[]).is_in("s"));
        assert!(record("s", &[]).is_in("s") && !record("t", &[]).is_in("s"));
        let metadata = r#"{"Version":"v1","Metadata":{"ID":"c","SandboxID":"s","Config":{}}}"#;
        for key in OF_CONTAINERS {
            let record = record("", &[(key, metadata)]);
            assert!(record.is_in("s") && !record.is_in("c") && record.is_of_the_cri());
        }
        // What containerd's core says goes before what the CRI keeps.
        assert!(!record("t", &[(OF_CONTAINERS[0], metadata)]).is_in("s"));
        assert!(!record("", &[(OF_CONTAINERS[0], "{")]).is_in("s"));
        assert!(!record("", &[("io.other.container.metadata", metadata)]).is_in("s"));
        assert!(record("", &[(OF_SANDBOXES[1], "")]).is_of_the_cri());
    }

    /// The message as containerd has it: fields that are not read are passed over.
    #[test]
    fn a_record_is_decoded() {
        #[derive(Clone, PartialEq, prost::Message)]
        struct Full {
            #[prost(string, tag = "1")]
            id: String,
            #[prost(map = "string, string", tag = "2")]
            labels: HashMap<String, String>,
            #[prost(string, tag = "11")]
            sandbox: String,
        }
        let labels = HashMap::from([("io.cri-containerd.kind".to_owned(), "container".to_owned())]);
        let full = Full { id: "c".to_owned(), labels, sandbox: "s".to_owned() };
        assert!(Record::decode(full.encode_to_vec().as_slice()).unwrap().is_in("s"));
    }

    #[test]
    fn a_containerd_that_is_gone_is_named() {
        let error = check("/nowhere/containerd.sock", "ns", "c", "s", true).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/nowhere/containerd.sock") && text.contains("container c"),
            "{text}"
        );
    }
}
