//! A stand-in for kubelet's lists of pods: who has which device, and which UIDs pods have.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures_util::{Stream, StreamExt, stream};
use prost::Message;
use slipway_kubelet_api::core;
use slipway_kubelet_api::podresources::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use slipway_kubelet_api::podresources::{
    AllocatableResourcesRequest, AllocatableResourcesResponse, ContainerDevices, ContainerResources,
    GetPodResourcesRequest, GetPodResourcesResponse, ListPodResourcesRequest, ListPodResourcesResponse,
    PodResources,
};
use slipway_kubelet_api::pods::pods_server::{Pods, PodsServer};
use slipway_kubelet_api::pods::{
    EventType, ListPodsRequest, ListPodsResponse, WatchPodsEvent, WatchPodsRequest,
};
use tokio::net::UnixListener;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::kubelet::GPU;

/// A pod with one container, "main".
#[derive(Clone)]
pub struct Pod {
    pub name: &'static str,
    pub uid: &'static str,
    /// Its container's id: slipwayd's, where it does not say whose.
    pub container: &'static str,
    pub devices: Vec<String>,
}

impl Pod {
    fn bytes(&self) -> Vec<u8> {
        let limits = [(GPU.to_owned(), core::Quantity { string: "1".into() })];
        let pod = core::Pod {
            metadata: Some(core::ObjectMeta {
                name: self.name.into(),
                namespace: "jobs".into(),
                uid: self.uid.into(),
            }),
            spec: Some(core::PodSpec {
                containers: vec![core::Container {
                    resources: Some(core::ResourceRequirements {
                        limits: limits.into(),
                    }),
                }],
                init_containers: vec![],
            }),
            status: Some(core::PodStatus {
                phase: "Running".into(),
                container_statuses: vec![core::ContainerStatus {
                    name: "main".into(),
                    container_id: match self.container.contains("://") {
                        true => self.container.to_owned(),
                        false => format!("slipway://{}", self.container),
                    },
                }],
                init_container_statuses: vec![],
            }),
        };
        pod.encode_to_vec()
    }

    fn resources(&self) -> PodResources {
        PodResources {
            name: self.name.into(),
            namespace: "jobs".into(),
            containers: vec![ContainerResources {
                name: "main".into(),
                devices: vec![ContainerDevices {
                    resource_name: GPU.into(),
                    device_ids: self.devices.clone(),
                }],
            }],
        }
    }
}

/// What a kubelet has of its APIs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Serves {
    /// Who has which device.
    Devices,
    /// Its pods too, when it is asked.
    Pods,
    /// And it tells of them by itself, and answers for a single pod.
    Everything,
}

#[derive(Default)]
struct State {
    pods: Vec<Pod>,
    /// It does not tell of its pods.
    mute: bool,
    asked: BTreeMap<&'static str, usize>,
}

#[derive(Clone)]
pub struct Who {
    state: Arc<Mutex<State>>,
    serves: Serves,
    events: broadcast::Sender<WatchPodsEvent>,
    open: watch::Sender<bool>,
}

impl Who {
    /// Serves both APIs; `uids`: whether there is one of pods.
    pub fn serve(resources: &Path, pods: &Path, uids: bool) -> Who {
        let serves = if uids { Serves::Pods } else { Serves::Devices };
        Who::serve_as(resources, pods, serves)
    }

    pub fn serve_as(resources: &Path, pods: &Path, serves: Serves) -> Who {
        let who = Who {
            state: Arc::default(),
            serves,
            events: broadcast::channel(64).0,
            open: watch::channel(true).0,
        };
        let ended = || {
            let mut open = who.open.subscribe();
            async move { drop(open.wait_for(|open| !open).await) }
        };
        let listen = |path: &Path| {
            let _ = std::fs::remove_file(path);
            UnixListenerStream::new(UnixListener::bind(path).unwrap())
        };
        let lister = PodResourcesListerServer::new(who.clone());
        let server = Server::builder()
            .add_service(lister)
            .serve_with_incoming_shutdown(listen(resources), ended());
        tokio::spawn(server);
        if serves != Serves::Devices {
            let server = Server::builder()
                .add_service(PodsServer::new(who.clone()))
                .serve_with_incoming_shutdown(listen(pods), ended());
            tokio::spawn(server);
        }
        who
    }

    /// Ends it, as a kubelet that is restarted: its streams end, and its connections.
    pub fn end(&self) {
        self.open.send_replace(false);
        let end = WatchPodsEvent {
            r#type: END,
            pod: Vec::new(),
        };
        let _ = self.events.send(end);
    }

    /// What it has now; whoever watches is told.
    pub fn set(&self, pods: Vec<Pod>) {
        let mut state = self.state.lock().unwrap();
        let before = std::mem::replace(&mut state.pods, pods);
        let event = |kind: EventType, pod: &Pod| WatchPodsEvent {
            r#type: kind.into(),
            pod: pod.bytes(),
        };
        let all = state.pods.iter().map(|p| event(EventType::Modified, p));
        let gone = before
            .iter()
            .filter(|b| state.pods.iter().all(|p| p.uid != b.uid));
        for event in all.chain(gone.map(|p| event(EventType::Deleted, p))) {
            let _ = self.events.send(event);
        }
    }

    /// What it has now; whoever watches is not told yet.
    pub fn set_untold(&self, pods: Vec<Pod>) {
        self.state.lock().unwrap().pods = pods;
    }

    fn count(&self, question: &'static str) {
        *self.state.lock().unwrap().asked.entry(question).or_default() += 1;
    }

    /// Whether it does not tell of its pods when it is asked.
    pub fn mute(&self, mute: bool) {
        self.state.lock().unwrap().mute = mute;
    }

    /// How often it was asked something: "list", "get", "pods", "watch".
    pub fn asked(&self, question: &str) -> usize {
        let state = self.state.lock().unwrap();
        state.asked.get(question).copied().unwrap_or(0)
    }
}

/// No kind of event: the end of the stream.
const END: i32 = -1;

#[tonic::async_trait]
impl PodResourcesLister for Who {
    async fn list(
        &self,
        _: Request<ListPodResourcesRequest>,
    ) -> Result<Response<ListPodResourcesResponse>, Status> {
        self.count("list");
        let state = self.state.lock().unwrap();
        Ok(Response::new(ListPodResourcesResponse {
            pod_resources: state.pods.iter().map(Pod::resources).collect(),
        }))
    }

    async fn get(
        &self,
        request: Request<GetPodResourcesRequest>,
    ) -> Result<Response<GetPodResourcesResponse>, Status> {
        self.count("get");
        if self.serves != Serves::Everything {
            return Err(Status::unimplemented("only the list is served"));
        }
        let state = self.state.lock().unwrap();
        let name = &request.get_ref().pod_name;
        let mut pods = state.pods.iter();
        // As kubelet says it.
        let pod = pods.find(|p| p.name == name);
        let pod = pod.ok_or_else(|| Status::unknown(format!("pod {name} in namespace jobs not found")))?;
        Ok(Response::new(GetPodResourcesResponse {
            pod_resources: Some(pod.resources()),
        }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<AllocatableResourcesRequest>,
    ) -> Result<Response<AllocatableResourcesResponse>, Status> {
        Err(Status::unimplemented("the agent knows what it has handed out"))
    }
}

#[tonic::async_trait]
impl Pods for Who {
    type WatchPodsStream = Pin<Box<dyn Stream<Item = Result<WatchPodsEvent, Status>> + Send>>;

    async fn watch_pods(
        &self,
        _: Request<WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        self.count("watch");
        if self.serves != Serves::Everything {
            return Err(Status::unimplemented("only the list is served"));
        }
        let state = self.state.lock().unwrap();
        let mut first: Vec<WatchPodsEvent> = state
            .pods
            .iter()
            .map(|p| WatchPodsEvent {
                r#type: EventType::Added.into(),
                pod: p.bytes(),
            })
            .collect();
        first.push(WatchPodsEvent {
            r#type: EventType::InitialSyncComplete.into(),
            pod: Vec::new(),
        });
        let then = stream::unfold(self.events.subscribe(), |mut events| async {
            let event = events.recv().await.ok()?;
            (event.r#type != END).then_some((Ok(event), events))
        });
        let all = stream::iter(first.into_iter().map(Ok)).chain(then);
        Ok(Response::new(Box::pin(all)))
    }

    async fn list_pods(&self, _: Request<ListPodsRequest>) -> Result<Response<ListPodsResponse>, Status> {
        self.count("pods");
        let state = self.state.lock().unwrap();
        if state.mute {
            return Err(Status::unavailable("it is busy"));
        }
        Ok(Response::new(ListPodsResponse {
            pods: state.pods.iter().map(Pod::bytes).collect(),
        }))
    }
}
