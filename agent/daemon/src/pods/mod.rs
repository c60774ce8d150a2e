//! Who has which device, and whose a process is: kubelet's list of devices (podresources), its list of pods for their UIDs,
//! where it has one (1.37), and the cgroup of a process. Asked when something is to be told, never in the way of a device.
//!
//! Where kubelet tells of its pods as they come and go, only the devices of those that have changed are asked for ([`live`]).
//! Where it does not, or for as long as it does not, everything is asked for each time.

mod cgroup;
mod live;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use slipway_kubelet_api::podresources::pod_resources_lister_client::PodResourcesListerClient;
use slipway_kubelet_api::podresources::{GetPodResourcesRequest, ListPodResourcesRequest};
use slipway_kubelet_api::pods::pods_client::PodsClient;
use slipway_kubelet_api::pods::{ListPodsRequest, WatchPodsRequest};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint, Uri};

use live::Live;

/// How long kubelet may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long somebody who can wait asks again.
const SOON: Duration = Duration::from_secs(300);
/// How long an answer is good: several who ask at once make one question.
const FRESH: Duration = Duration::from_millis(500);
/// Pods that are asked about one by one; for more, the list is the smaller question.
const MAX_SINGLE: usize = 4;
/// Largest answer.
const MAX_MESSAGE: usize = 64 << 20;
/// Between two attempts to hear of pods.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(60);

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
    /// Id by name, as Kubernetes has it: `RUNTIME://ID`, empty before there is one.
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

    /// The id of a holder's container with its runtime's name before it, where kubelet tells: `RUNTIME://ID`.
    pub fn id_of(&self, holder: &Holder) -> Option<&str> {
        let pod = self.pods.get(holder.uid.as_ref()?)?;
        let id = pod.containers.get(&holder.container);
        id.map(String::as_str).filter(|id| !id.is_empty())
    }

    /// The container that a process is in: by its cgroup, and where kubelet tells no UIDs, by being the only one that has
    /// one of the devices.
    pub fn of_process(&self, proc: &Path, pid: u32, devices: &[&str]) -> Option<Holder> {
        let text = std::fs::read_to_string(proc.join(format!("{pid}/cgroup"))).ok()?;
        let place = cgroup::place(&text)?;
        if let Some(pod) = self.pods.get(&place.pod) {
            let is = |id: &str| id.rsplit("://").next() == Some(place.container.as_str());
            let mut all = pod.containers.iter();
            let name = all.find(|(_, id)| is(id)).map(|(name, _)| name.clone());
            return Some(Holder {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                container: name.unwrap_or_default(),
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
    live: Arc<Told>,
    follower: JoinHandle<()>,
}

/// What kubelet tells of its pods by itself.
type Told = std::sync::Mutex<Live>;

fn lock(live: &Told) -> MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Hears what kubelet tells of its pods, for ever. A kubelet that does not tell is asked again from time to time: another
/// version may be started in its place.
async fn follow(pods: Channel, live: Arc<Told>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut client = PodsClient::new(pods.clone()).max_decoding_message_size(MAX_MESSAGE);
        if let Ok(stream) = client.watch_pods(WatchPodsRequest {}).await {
            let mut events = stream.into_inner();
            while let Ok(Some(event)) = events.message().await {
                pause = FIRST_PAUSE;
                if !lock(&live).heard(&event) {
                    pause = MAX_PAUSE;
                    break;
                }
            }
        }
        lock(&live).forget();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

impl Pods {
    /// Of the kubelet with these sockets.
    pub fn of(resources: &Path, pods: &Path) -> Pods {
        let live = Arc::<Told>::default();
        let pods = channel(pods.to_owned());
        Pods {
            resources: channel(resources.to_owned()),
            follower: tokio::spawn(follow(pods.clone(), Arc::clone(&live))),
            pods,
            last: Mutex::default(),
            live,
        }
    }

    /// What kubelet says now.
    ///
    /// # Errors
    /// It does not answer. Without its list of pods alone, UIDs are missing.
    pub async fn now(&self) -> Result<Arc<Snapshot>, tonic::Status> {
        // Several who ask at once make one question.
        let mut last = self.last.lock().await;
        if let Some(snapshot) = self.told().await? {
            return Ok(snapshot);
        }
        if let Some((at, snapshot)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(snapshot));
        }
        let snapshot = Arc::new(self.ask().await?);
        *last = Some((Instant::now(), Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    /// What kubelet says as soon as it answers: one that is being restarted is asked again, for some minutes.
    ///
    /// # Errors
    /// As [`Pods::now`], the last time.
    pub async fn soon(&self) -> Result<Arc<Snapshot>, tonic::Status> {
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.now().await {
                Err(_) if began.elapsed() < SOON => tokio::time::sleep(pause).await,
                done => return done,
            }
            pause = (pause * 2).min(PATIENCE * 5);
        }
    }

    /// What kubelet says to a question that is asked now.
    ///
    /// # Errors
    /// As [`Pods::now`].
    pub async fn anew(&self) -> Result<Snapshot, tonic::Status> {
        self.ask().await
    }

    /// What kubelet has told, and the devices of those that have changed; none: it tells nothing.
    async fn told(&self) -> Result<Option<Arc<Snapshot>>, tonic::Status> {
        let Some(unasked) = lock(&self.live).unasked() else {
            return Ok(None);
        };
        let mut client = self.lister();
        let mut whole = unasked.len() > MAX_SINGLE;
        for pod in unasked.iter().filter(|_| unasked.len() <= MAX_SINGLE) {
            let request = GetPodResourcesRequest {
                pod_name: pod.name.clone(),
                pod_namespace: pod.namespace.clone(),
            };
            match client.get(request).await {
                Ok(answer) => {
                    let devices = answer.into_inner().pod_resources.unwrap_or_default();
                    lock(&self.live).asked(&pod.uid, pod.since, devices);
                }
                // It is gone, or kubelet answers no such question: the list tells.
                Err(_) => {
                    whole = true;
                    break;
                }
            }
        }
        if whole {
            let changes = lock(&self.live).changes();
            let list = client.list(ListPodResourcesRequest {}).await?.into_inner();
            lock(&self.live).listed(changes, list.pod_resources);
        }
        // None: kubelet has told of another change meanwhile.
        Ok(lock(&self.live).snapshot())
    }

    fn lister(&self) -> PodResourcesListerClient<Channel> {
        PodResourcesListerClient::new(self.resources.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn ask(&self) -> Result<Snapshot, tonic::Status> {
        let list = self.lister().list(ListPodResourcesRequest {}).await?.into_inner();
        let pods = PodsClient::new(self.pods.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .list_pods(ListPodsRequest {})
            .await;
        let mut snapshot = Snapshot::default();
        let mut uids = BTreeMap::new();
        for bytes in pods.map(|p| p.into_inner().pods).unwrap_or_default() {
            if let Some(live::Told { uid, pod, .. }) = live::told(&bytes) {
                uids.insert((pod.namespace.clone(), pod.name.clone()), uid.clone());
                snapshot.pods.insert(uid, pod);
            }
        }
        for pod in &list.pod_resources {
            snapshot.put(pod, uids.get(&(pod.namespace.clone(), pod.name.clone())));
        }
        Ok(snapshot)
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.follower.abort();
    }
}
