//! A stand-in for kubelet's part of the device plugin API, with its habits: it dials back while it is being registered with,
//! the last endpoint of a resource is the one that counts, a name that came before is refused, and a start wipes the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use slipway_fake_gpu::Topology;
use slipway_kubelet_api::v1beta1::device_plugin_client::DevicePluginClient;
use slipway_kubelet_api::v1beta1::registration_server::{Registration, RegistrationServer};
use slipway_kubelet_api::v1beta1::{Device, Empty, RegisterRequest};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Request, Response, Status};

use crate::node::Node;

/// What whole GPUs are called.
pub const GPU: &str = "nvidia.com/gpu";

/// One resource as kubelet knows it.
#[derive(Debug, Clone)]
pub struct Known {
    pub endpoint: String,
    pub devices: Vec<Device>,
    pub lists: usize,
    pub ended: bool,
    pub at: Instant,
}

#[derive(Default)]
struct State {
    known: BTreeMap<String, Known>,
    /// The first list of each resource.
    first: BTreeMap<String, Vec<Device>>,
    names: BTreeSet<String>,
    streams: BTreeMap<String, tokio::task::JoinHandle<()>>,
}

pub struct Kubelet {
    folder: PathBuf,
    state: Arc<Mutex<State>>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

struct Registrar {
    folder: PathBuf,
    state: Arc<Mutex<State>>,
}

pub async fn dial(socket: PathBuf) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_static("http://plugin")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }))
        .await
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let r = request.into_inner();
        if r.version != "v1beta1" || r.endpoint.contains('/') || !r.resource_name.contains('/') {
            return Err(Status::invalid_argument(format!("{r:?}")));
        }
        if !self.state.lock().unwrap().names.insert(r.endpoint.clone()) {
            return Err(Status::already_exists(r.endpoint));
        }
        let channel = dial(self.folder.join(&r.endpoint))
            .await
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let mut plugin = DevicePluginClient::new(channel);
        let options = plugin.get_device_plugin_options(Empty {}).await?.into_inner();
        if Some(options) != r.options {
            return Err(Status::invalid_argument("options differ"));
        }
        let state = Arc::clone(&self.state);
        let resource = r.resource_name.clone();
        let stream = tokio::spawn(async move {
            let mut lists = plugin.list_and_watch(Empty {}).await.unwrap().into_inner();
            let mut count = 0;
            while let Ok(Some(list)) = lists.message().await {
                count += 1;
                let known = Known {
                    endpoint: r.endpoint.clone(),
                    devices: list.devices,
                    lists: count,
                    ended: false,
                    at: Instant::now(),
                };
                let mut state = state.lock().unwrap();
                let first = state.first.entry(r.resource_name.clone());
                first.or_insert_with(|| known.devices.clone());
                state.known.insert(r.resource_name.clone(), known);
            }
            if let Some(known) = state.lock().unwrap().known.get_mut(&r.resource_name)
                && known.endpoint == r.endpoint
            {
                known.ended = true;
            }
        });
        let mut state = self.state.lock().unwrap();
        // The stream before it goes on: its end is for the plugin to bring about.
        state.streams.insert(resource, stream);
        drop(state);
        Ok(Response::new(Empty {}))
    }
}

impl Kubelet {
    /// Starts with an empty folder.
    pub fn start(folder: &Path) -> Kubelet {
        for entry in std::fs::read_dir(folder).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let state = Arc::<Mutex<State>>::default();
        let listener = UnixListener::bind(folder.join("kubelet.sock")).unwrap();
        let registrar = Registrar {
            folder: folder.to_owned(),
            state: Arc::clone(&state),
        };
        let server = Server::builder()
            .add_service(RegistrationServer::new(registrar))
            .serve_with_incoming(UnixListenerStream::new(listener));
        Kubelet {
            folder: folder.to_owned(),
            state,
            server: tokio::spawn(server),
        }
    }

    pub fn known(&self, resource: &str) -> Option<Known> {
        self.state.lock().unwrap().known.get(resource).cloned()
    }

    /// The first list that came of a resource.
    pub fn first(&self, resource: &str) -> Vec<Device> {
        self.state.lock().unwrap().first[resource].clone()
    }

    /// How often anything was registered with it.
    pub fn registrations(&self) -> usize {
        self.state.lock().unwrap().names.len()
    }

    pub fn resources(&self) -> Vec<String> {
        self.state.lock().unwrap().known.keys().cloned().collect()
    }

    /// Ids of the devices of a resource that are (not) healthy.
    pub fn ids(&self, resource: &str, healthy: bool) -> Vec<String> {
        let health = if healthy { "Healthy" } else { "Unhealthy" };
        let devices = self.known(resource).map(|k| k.devices).unwrap_or_default();
        devices
            .into_iter()
            .filter(|d| d.health == health)
            .map(|d| d.id)
            .collect()
    }

    /// Hears a resource's list no longer, without a word.
    pub fn hang_up(&self, resource: &str) {
        self.state.lock().unwrap().streams[resource].abort();
    }

    /// A client of the plugin that counts.
    pub async fn plugin(&self, resource: &str) -> DevicePluginClient<Channel> {
        let endpoint = self.known(resource).unwrap().endpoint;
        DevicePluginClient::new(dial(self.folder.join(endpoint)).await.unwrap())
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A node whose kubelet has a list with this many healthy GPUs; how long that took.
pub async fn ready(topology: &Topology, more: &str, count: usize) -> (Node, Kubelet, Duration) {
    let mut node = Node::of(topology, more);
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    let there = || kubelet.ids(GPU, true).len() == count;
    let took = node.wait(&format!("a list of {count}"), there).await;
    (node, kubelet, took)
}

/// [`ready`] with a topology that ships.
pub async fn ready_with(topology: &str, more: &str, count: usize) -> (Node, Kubelet) {
    let (node, kubelet, _) = ready(&Topology::named(topology).unwrap(), more, count).await;
    (node, kubelet)
}
