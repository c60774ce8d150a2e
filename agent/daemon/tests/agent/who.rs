//! A stand-in for kubelet's lists of pods: who has which device, and which UIDs pods have.

use std::path::Path;
use std::sync::{Arc, Mutex};

use prost::Message;
use slipway_kubelet_api::core;
use slipway_kubelet_api::podresources::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use slipway_kubelet_api::podresources::{
    ContainerDevices, ContainerResources, GetPodResourcesRequest, GetPodResourcesResponse,
    ListPodResourcesRequest, ListPodResourcesResponse, PodResources,
};
use slipway_kubelet_api::pods::pods_server::{Pods, PodsServer};
use slipway_kubelet_api::pods::{ListPodsRequest, ListPodsResponse};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::kubelet::GPU;

/// A pod with one container, "main".
#[derive(Clone)]
pub struct Pod {
    pub name: &'static str,
    pub uid: &'static str,
    pub container: &'static str,
    pub devices: Vec<String>,
}

#[derive(Clone, Default)]
pub struct Who(Arc<Mutex<Vec<Pod>>>);

impl Who {
    /// Serves both APIs; `uids`: whether there is one of pods.
    pub fn serve(resources: &Path, pods: &Path, uids: bool) -> Who {
        let who = Who::default();
        let listener = UnixListener::bind(resources).unwrap();
        tokio::spawn(
            Server::builder()
                .add_service(PodResourcesListerServer::new(who.clone()))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        if uids {
            let listener = UnixListener::bind(pods).unwrap();
            tokio::spawn(
                Server::builder()
                    .add_service(PodsServer::new(who.clone()))
                    .serve_with_incoming(UnixListenerStream::new(listener)),
            );
        }
        who
    }

    pub fn set(&self, pods: Vec<Pod>) {
        *self.0.lock().unwrap() = pods;
    }
}

#[tonic::async_trait]
impl PodResourcesLister for Who {
    async fn list(
        &self,
        _: Request<ListPodResourcesRequest>,
    ) -> Result<Response<ListPodResourcesResponse>, Status> {
        let pod = |p: &Pod| PodResources {
            name: p.name.into(),
            namespace: "jobs".into(),
            containers: vec![ContainerResources {
                name: "main".into(),
                devices: vec![ContainerDevices {
                    resource_name: GPU.into(),
                    device_ids: p.devices.clone(),
                }],
            }],
        };
        Ok(Response::new(ListPodResourcesResponse {
            pod_resources: self.0.lock().unwrap().iter().map(pod).collect(),
        }))
    }

    async fn get(
        &self,
        _: Request<GetPodResourcesRequest>,
    ) -> Result<Response<GetPodResourcesResponse>, Status> {
        Err(Status::unimplemented("only the list is asked for"))
    }
}

#[tonic::async_trait]
impl Pods for Who {
    async fn list_pods(&self, _: Request<ListPodsRequest>) -> Result<Response<ListPodsResponse>, Status> {
        let pod = |p: &Pod| core::Pod {
            metadata: Some(core::ObjectMeta {
                name: p.name.into(),
                namespace: "jobs".into(),
                uid: p.uid.into(),
            }),
            status: Some(core::PodStatus {
                container_statuses: vec![core::ContainerStatus {
                    name: "main".into(),
                    container_id: format!("containerd://{}", p.container),
                }],
                init_container_statuses: vec![],
            }),
        };
        Ok(Response::new(ListPodsResponse {
            pods: self
                .0
                .lock()
                .unwrap()
                .iter()
                .map(|p| pod(p).encode_to_vec())
                .collect(),
        }))
    }
}
