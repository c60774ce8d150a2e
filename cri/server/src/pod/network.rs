//! A pod's attachment to the network: recorded before ADD, undone with what ADD left behind, retried until proven.
//!
//! A DEL that fails never holds a pod back: its attachment moves to a `network-release` record, whose address stays
//! leased until [`retry_release`] has proven it gone. The pinned namespace stays exactly as long.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use slipway_network::{Attachment, Bandwidth, PodNetwork};

use super::Pod;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
use crate::ids::PodId;
use crate::model::{PodConfig, Protocol, Scope};
use crate::pod::dir::PodDir;
use crate::records::{Kind, NetworkRelease, PodNetworkState};

/// Attachments whose DEL has not been proven, by pod.
#[derive(Default)]
pub struct Releases {
    pending: Mutex<HashMap<PodId, NetworkRelease>>,
}

impl Releases {
    pub fn insert(&self, release: NetworkRelease) {
        self.lock().insert(release.pod.clone(), release);
    }

    pub fn contains(&self, pod: &PodId) -> bool {
        self.lock().contains_key(pod)
    }

    fn get(&self, pod: &PodId) -> Option<NetworkRelease> {
        self.lock().get(pod).cloned()
    }

    pub fn all(&self) -> Vec<NetworkRelease> {
        self.lock().values().cloned().collect()
    }

    fn remove(&self, pod: &PodId) {
        self.lock().remove(pod);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PodId, NetworkRelease>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What attaching the pod will do, on disk before it is done; `None` for a pod on the host's network. The namespace need
/// not be there yet.
pub async fn plan(daemon: &Daemon, pod: &Pod) -> Result<Option<Attachment>, Error> {
    if pod.record().config.namespaces.network == Scope::Node {
        return Ok(None);
    }
    let wanted = describe(pod, pod.namespace(daemon, "net"))?;
    let plan = daemon.cni.plan(&wanted).await.map_err(failed(pod))?;
    let recorded = Box::new(plan.clone());
    pod.transition(&daemon.records, |state| {
        state.network = PodNetworkState::Planned(recorded);
        true
    })
    .await?;
    Ok(Some(plan))
}

/// Carries a plan out; the pod's addresses. What came of it goes to disk with READY: until then the plan is what DEL is
/// run with, which needs no more.
pub async fn attach(daemon: &Daemon, pod: &Pod, plan: Attachment) -> Result<Vec<IpAddr>, Error> {
    fail::point("run_pod_sandbox.before_cni").await?;
    let attachment = daemon.cni.attach(plan).await.map_err(failed(pod))?;
    let ips = attachment.ips.clone();
    pod.remember_network(PodNetworkState::Attached(Box::new(attachment)))
        .await;
    fail::point("run_pod_sandbox.after_cni").await?;
    Ok(ips)
}

fn failed(pod: &Pod) -> impl FnOnce(slipway_network::CniError) -> Error {
    let id = pod.id().to_string();
    move |source| Error::Network {
        act: "attach the network",
        id,
        source: Box::new(source),
    }
}

/// Gives the network back. True: proven, or there was none; false: a network-release record has taken it over.
pub async fn detach(daemon: &Daemon, pod: &Pod) -> Result<bool, Error> {
    let attachment = match pod.state().network {
        PodNetworkState::Host => return Ok(true),
        PodNetworkState::Released => return Ok(!daemon.releases.contains(pod.id())),
        PodNetworkState::Planned(attachment) | PodNetworkState::Attached(attachment) => *attachment,
    };
    let proven = match delete(daemon, pod.id(), &attachment).await {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(pod = %pod.id(), error = error.chain(), "CNI DEL failed; it will be retried");
            leave_to_janitor(daemon, pod, attachment).await?;
            false
        }
    };
    pod.transition(&daemon.records, |state| {
        state.network = PodNetworkState::Released;
        true
    })
    .await?;
    Ok(proven)
}

/// Gives the network of a pod that another boot ended to the janitor, without asking any plugin now.
pub async fn hand_over(daemon: &Daemon, pod: &Pod) -> Result<(), Error> {
    let attachment = match pod.state().network {
        PodNetworkState::Host | PodNetworkState::Released => return Ok(()),
        PodNetworkState::Planned(attachment) | PodNetworkState::Attached(attachment) => *attachment,
    };
    leave_to_janitor(daemon, pod, attachment).await?;
    pod.transition(&daemon.records, |state| {
        state.network = PodNetworkState::Released;
        true
    })
    .await
}

async fn leave_to_janitor(daemon: &Daemon, pod: &Pod, attachment: Attachment) -> Result<(), Error> {
    let release = NetworkRelease {
        version: crate::records::version(),
        pod: pod.id().clone(),
        boot_id: pod.record().boot_id.clone(),
        since_ns: crate::time::now_ns(),
        attachment,
    };
    daemon
        .records
        .put_giving_back(Kind::NetworkRelease, pod.id().as_str(), &release)
        .await?;
    daemon.releases.insert(release);
    daemon.janitor.wake();
    Ok(())
}

async fn delete(daemon: &Daemon, pod: &PodId, attachment: &Attachment) -> Result<(), Error> {
    daemon.cni.del(attachment).await.map_err(|source| Error::Network {
        act: "detach the network",
        id: pod.to_string(),
        source: Box::new(source),
    })
}

/// Tries a pod's release once more. None is fine.
pub async fn retry_release(daemon: &Arc<Daemon>, pod: &PodId) -> Result<(), Error> {
    let Some(release) = daemon.releases.get(pod) else {
        return Ok(());
    };
    delete(daemon, pod, &release.attachment).await?;
    release_proven(daemon, &release).await
}

/// The last holder of the namespace is gone: it is unpinned, and what else was kept with it goes too.
async fn release_proven(daemon: &Arc<Daemon>, release: &NetworkRelease) -> Result<(), Error> {
    // A removal in progress decides by the release whether the directory is its own to remove.
    let _turn = match daemon.registry.pod(release.pod.as_str()) {
        Ok(pod) => Some(pod.begin("releasing its network").await?),
        Err(_) => None,
    };
    let dir = PodDir::new(&daemon.paths.pods, &release.pod);
    if dir.path().exists() {
        daemon
            .launcher
            .cleanup(dir.path(), true)
            .await
            .map_err(Error::shim("clean up what is left", &release.pod))?;
        if daemon.registry.pod(release.pod.as_str()).is_err() {
            crate::blocking::run(move || dir.remove()).await?;
        }
    }
    daemon
        .records
        .delete(Kind::NetworkRelease, release.pod.as_str())
        .await?;
    daemon.releases.remove(&release.pod);
    tracing::info!(pod = %release.pod, "a network has been released at last");
    Ok(())
}

/// Where the pod's network namespace is pinned.
pub fn netns(pod: &Pod) -> PathBuf {
    let state = pod.state();
    state
        .namespaces
        .iter()
        .find(|ns| ns.kind == "net")
        .map(|ns| ns.path.clone())
        .unwrap_or_default()
}

fn describe(pod: &Pod, netns: PathBuf) -> Result<PodNetwork, Error> {
    let config: &PodConfig = &pod.record().config;
    let bandwidth = bandwidth(config)?;
    Ok(PodNetwork {
        id: pod.id().to_string(),
        name: config.metadata.name.clone(),
        namespace: config.metadata.namespace.clone(),
        uid: config.metadata.uid.clone(),
        netns,
        port_mappings: config
            .port_mappings
            .iter()
            .map(|mapping| slipway_network::PortMapping {
                host_port: mapping.host_port,
                container_port: mapping.container_port,
                protocol: match mapping.protocol {
                    Protocol::Tcp => slipway_network::Protocol::Tcp,
                    Protocol::Udp => slipway_network::Protocol::Udp,
                    Protocol::Sctp => slipway_network::Protocol::Sctp,
                },
                host_ip: mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
            .collect(),
        bandwidth,
        dns: config.dns.as_ref().map(|dns| slipway_network::Dns {
            nameservers: dns.servers.clone(),
            search: dns.searches.clone(),
            options: dns.options.clone(),
            ..Default::default()
        }),
        annotations: config.annotations.clone(),
        ..Default::default()
    })
}

/// Limits that the pod's annotations ask for.
///
/// # Errors
/// One that is no quantity, or out of bounds.
pub fn bandwidth(config: &PodConfig) -> Result<Option<Bandwidth>, Error> {
    Bandwidth::from_annotations(&config.annotations)
        .map_err(|error| Error::invalid("config.annotations", error.to_string()))
}
