//! What kubelet itself says of devices: which are healthy, and who has which. The node's object at the API server follows
//! seconds later.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use slipway_kubelet_api::podresources::pod_resources_lister_client::PodResourcesListerClient;
use slipway_kubelet_api::podresources::{AllocatableResourcesRequest, ListPodResourcesRequest};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::kube::Kube;

/// A node's kubelet, asked about devices.
pub struct Devices {
    socket: PathBuf,
}

impl Devices {
    /// Of node `n`.
    pub fn of(k: &Kube, n: usize) -> Devices {
        Devices {
            socket: k.cluster.node_dir(n).join("kubelet/pod-resources/kubelet.sock"),
        }
    }

    async fn ask(&self) -> Result<PodResourcesListerClient<Channel>> {
        let socket = self.socket.clone();
        let channel = Endpoint::from_static("http://kubelet")
            .timeout(Duration::from_secs(5))
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
            }))
            .await
            .with_context(|| format!("connecting to {}", self.socket.display()))?;
        Ok(PodResourcesListerClient::new(channel))
    }

    /// Ids of the healthy devices of a resource.
    pub async fn healthy(&self, resource: &str) -> Result<BTreeSet<String>> {
        let all = self
            .ask()
            .await?
            .get_allocatable_resources(AllocatableResourcesRequest {})
            .await?;
        let of = all.into_inner().devices.into_iter();
        let of = of.filter(|d| d.resource_name == resource);
        Ok(of.flat_map(|d| d.device_ids).collect())
    }

    /// Waits until these are the healthy devices of a resource; how long that took.
    pub async fn until(&self, resource: &str, ids: &BTreeSet<String>, limit: Duration) -> Result<Duration> {
        let began = Instant::now();
        loop {
            // It does not answer while it is being started.
            let now = self.healthy(resource).await;
            if now.as_ref().is_ok_and(|now| now == ids) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                bail!("after {limit:?} kubelet has {now:?} of {resource}, not {ids:?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Who has which device of a resource, as "NAMESPACE/POD". A device of two pods is an error.
    pub async fn holders(&self, resource: &str) -> Result<BTreeMap<String, String>> {
        let list = self.ask().await?.list(ListPodResourcesRequest {}).await?;
        let mut holders = BTreeMap::new();
        for pod in list.into_inner().pod_resources {
            let name = format!("{}/{}", pod.namespace, pod.name);
            let devices = pod.containers.into_iter().flat_map(|c| c.devices);
            for id in devices
                .filter(|d| d.resource_name == resource)
                .flat_map(|d| d.device_ids)
            {
                let other = holders.insert(id.clone(), name.clone());
                ensure!(other.is_none(), "{id} is of {name} and of {other:?}");
            }
        }
        Ok(holders)
    }
}
