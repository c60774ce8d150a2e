//! Who has which device, and whose a process is: kubelet's list of devices (podresources), its list of pods for their UIDs,
//! where it has one (1.37), and the cgroup of a process. Asked when something is to be told, never in the way of a device.

mod cgroup;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use slipway_kubelet_api::core;
use slipway_kubelet_api::podresources::ListPodResourcesRequest;
use slipway_kubelet_api::podresources::pod_resources_lister_client::PodResourcesListerClient;
use slipway_kubelet_api::pods::ListPodsRequest;
use slipway_kubelet_api::pods::pods_client::PodsClient;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::node::device_of;

/// How long kubelet may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long an answer is good: several who ask at once make one question.
const FRESH: Duration = Duration::from_millis(500);

/// A container of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name.
    pub container: String,
    /// The pod's UID, when kubelet tells.
    pub uid: Option<String>,
}

/// A pod that kubelet told the UID of.
#[derive(Debug, Clone, Default)]
struct Pod {
    namespace: String,
    name: String,
    /// Name by id.
    containers: BTreeMap<String, String>,
}

/// Everything that kubelet says at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// By the UUID of the device: several with shared GPUs.
    holders: BTreeMap<String, Vec<(String, Holder)>>,
    pods: BTreeMap<String, Pod>,
}

impl Snapshot {
    /// The containers that have a device, each with the resource it has it as.
    pub fn holders(&self, device: &str) -> &[(String, Holder)] {
        self.holders.get(device).map_or(&[], Vec::as_slice)
    }

    /// The container that a process is in: by its cgroup, and where kubelet tells no UIDs, by being the only one that has
    /// one of the devices.
    pub fn of_process(&self, proc: &Path, pid: u32, devices: &[&str]) -> Option<Holder> {
        let text = std::fs::read_to_string(proc.join(format!("{pid}/cgroup"))).ok()?;
        let place = cgroup::place(&text)?;
        if let Some(pod) = self.pods.get(&place.pod) {
            return Some(Holder {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                container: pod.containers.get(&place.container).cloned().unwrap_or_default(),
                uid: Some(place.pod),
            });
        }
        let mut all = devices.iter().flat_map(|d| self.holders(d));
        match (all.next(), all.next()) {
            (Some((_, only)), None) => Some(Holder {
                uid: Some(place.pod),
                ..only.clone()
            }),
            _ => None,
        }
    }
}

/// kubelet, asked about its pods.
#[derive(Debug)]
pub struct Pods {
    resources: Channel,
    pods: Channel,
    last: Mutex<Option<(Instant, Arc<Snapshot>)>>,
}

fn channel(socket: PathBuf) -> Channel {
    Endpoint::from_static("http://kubelet")
        .connect_timeout(PATIENCE)
        .timeout(PATIENCE)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }))
}

impl Pods {
    /// Of the kubelet with these sockets; connects when asked.
    pub fn of(resources: &Path, pods: &Path) -> Pods {
        Pods {
            resources: channel(resources.to_owned()),
            pods: channel(pods.to_owned()),
            last: Mutex::default(),
        }
    }

    /// What kubelet says now.
    ///
    /// # Errors
    /// It does not answer. Without its list of pods alone, UIDs are missing.
    pub async fn now(&self) -> Result<Arc<Snapshot>, tonic::Status> {
        let mut last = self.last.lock().await;
        if let Some((at, snapshot)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(snapshot));
        }
        let snapshot = Arc::new(self.ask().await?);
        *last = Some((Instant::now(), Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    async fn ask(&self) -> Result<Snapshot, tonic::Status> {
        let list = PodResourcesListerClient::new(self.resources.clone())
            .max_decoding_message_size(64 << 20)
            .list(ListPodResourcesRequest {})
            .await?
            .into_inner();
        let pods = PodsClient::new(self.pods.clone())
            .max_decoding_message_size(64 << 20)
            .list_pods(ListPodsRequest {})
            .await;
        let mut snapshot = Snapshot::default();
        let mut uids = BTreeMap::new();
        for bytes in pods.map(|p| p.into_inner().pods).unwrap_or_default() {
            let Ok(core::Pod {
                metadata: Some(meta),
                status,
            }) = core::Pod::decode(bytes.as_slice())
            else {
                continue;
            };
            uids.insert((meta.namespace.clone(), meta.name.clone()), meta.uid.clone());
            let status = status.unwrap_or_default();
            let containers = status.container_statuses.into_iter();
            let containers = containers.chain(status.init_container_statuses).filter_map(|c| {
                let id = c.container_id.rsplit("://").next()?.to_owned();
                Some((id, c.name))
            });
            let pod = Pod {
                namespace: meta.namespace,
                name: meta.name,
                containers: containers.collect(),
            };
            snapshot.pods.insert(meta.uid, pod);
        }
        for pod in list.pod_resources {
            let uid = uids.get(&(pod.namespace.clone(), pod.name.clone()));
            for container in pod.containers {
                let holder = Holder {
                    namespace: pod.namespace.clone(),
                    pod: pod.name.clone(),
                    container: container.name,
                    uid: uid.cloned(),
                };
                for devices in container.devices {
                    for id in &devices.device_ids {
                        let entry = (devices.resource_name.clone(), holder.clone());
                        let holders = snapshot.holders.entry(device_of(id).to_owned()).or_default();
                        if !holders.contains(&entry) {
                            holders.push(entry);
                        }
                    }
                }
            }
        }
        Ok(snapshot)
    }
}
