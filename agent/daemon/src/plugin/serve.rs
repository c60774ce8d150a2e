//! A plugin's five verbs. None of them asks NVML or waits for anything: kubelet admits one pod at a time.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use slipway_cdi::{ContainerEdits, Spec};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Plugin;
use crate::config::Allocate;
use crate::node::Item;
use crate::prefer::prefer;
use slipway_kubelet_api::v1beta1::device_plugin_server::DevicePlugin;
use slipway_kubelet_api::v1beta1::{
    AllocateRequest, AllocateResponse, CdiDevice, ContainerAllocateResponse,
    ContainerPreferredAllocationResponse, Device, DevicePluginOptions, DeviceSpec, Empty,
    ListAndWatchResponse, Mount, NumaNode, PreStartContainerRequest, PreStartContainerResponse,
    PreferredAllocationRequest, PreferredAllocationResponse, TopologyInfo,
};

/// A plugin being served.
pub struct Served {
    pub plugin: Plugin,
    /// How many clients have the list and hear of its changes.
    pub lists: watch::Sender<usize>,
    /// The streams end with it.
    pub open: watch::Receiver<bool>,
}

/// A client that has the list, as long as it is heard.
struct Listed(watch::Sender<usize>);

impl Listed {
    fn count(lists: &watch::Sender<usize>) -> Listed {
        lists.send_modify(|n| *n += 1);
        Listed(lists.clone())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// What the plugin says of itself.
pub fn options() -> DevicePluginOptions {
    DevicePluginOptions {
        pre_start_required: true,
        get_preferred_allocation_available: true,
    }
}

fn device(item: &Item) -> Device {
    Device {
        id: item.id.clone(),
        health: if item.unhealthy.is_none() {
            "Healthy"
        } else {
            "Unhealthy"
        }
        .to_owned(),
        // Left out where it is not known: a number that is none makes kubelet refuse pods.
        topology: item.numa.map(|node| TopologyInfo {
            nodes: vec![NumaNode { id: i64::from(node) }],
        }),
    }
}

fn list(items: &[Item]) -> ListAndWatchResponse {
    ListAndWatchResponse {
        devices: items.iter().map(device).collect(),
    }
}

#[tonic::async_trait]
impl DevicePlugin for Served {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let (to, from) = mpsc::channel(1);
        let (mut plugin, mut open) = (self.plugin.clone(), self.open.clone());
        let lists = self.lists.clone();
        tokio::spawn(async move {
            let mut sent: Option<(Listed, Vec<Item>)> = None;
            loop {
                let posted = Arc::clone(&plugin.board.borrow_and_update());
                let items = posted.of(&plugin.resource);
                match &mut sent {
                    Some((_, before)) if before == items => {}
                    before => {
                        // A client that is gone is seen below, and here.
                        if to.send(Ok(list(items))).await.is_err() {
                            return;
                        }
                        let listed = before.take().map(|(listed, _)| listed);
                        let listed = listed.unwrap_or_else(|| Listed::count(&lists));
                        *before = Some((listed, items.to_vec()));
                    }
                }
                tokio::select! {
                    changed = plugin.board.changed() => if changed.is_err() { return },
                    // Another registration has taken over: this list's end changes nothing for kubelet.
                    _ = open.wait_for(|open| !open) => return,
                    () = to.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(from))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let posted = self.plugin.posted();
        let items = posted.of(&self.plugin.resource);
        let choose = |r: &slipway_kubelet_api::v1beta1::ContainerPreferredAllocationRequest| {
            let size = usize::try_from(r.allocation_size).unwrap_or(0);
            ContainerPreferredAllocationResponse {
                device_i_ds: prefer(
                    &posted.inventory,
                    items,
                    &r.available_device_i_ds,
                    &r.must_include_device_i_ds,
                    size,
                ),
            }
        };
        Ok(Response::new(PreferredAllocationResponse {
            container_responses: request.get_ref().container_requests.iter().map(choose).collect(),
        }))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let posted = self.plugin.posted();
        let items = posted.of(&self.plugin.resource);
        let mut container_responses = Vec::new();
        for container in &request.get_ref().container_requests {
            let uuids = self.chosen(items, &container.devices_ids)?;
            container_responses.push(self.response(&uuids, posted.spec.as_ref())?);
        }
        tracing::info!(resource = self.plugin.resource, devices = ?request.get_ref().container_requests.iter().map(|c| &c.devices_ids).collect::<Vec<_>>(), "allocated");
        Ok(Response::new(AllocateResponse { container_responses }))
    }

    /// Before every start, so that a container that is started again does not get a device that has become sick.
    async fn pre_start_container(
        &self,
        request: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        let posted = self.plugin.posted();
        let items = posted.of(&self.plugin.resource);
        for id in &request.get_ref().devices_ids {
            let item = items.iter().find(|i| i.id == *id);
            let item = item.ok_or_else(|| {
                Status::not_found(format!("{} {id} is not there any more", self.plugin.resource))
            })?;
            if let Some(reason) = &item.unhealthy
                && self.plugin.refuse_start
            {
                // One that is not heard is told again: kubelet tries on.
                let _ = self.plugin.refused.try_send(item.gpu.clone());
                return Err(Status::failed_precondition(format!(
                    "{} {id} is unhealthy: {reason}; nothing is started on it before it is well again (slipway-agent, faults.refuse_start)",
                    self.plugin.resource
                )));
            }
        }
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

impl Served {
    /// The devices behind kubelet's ids.
    #[allow(clippy::result_large_err, reason = "tonic's own type")]
    fn chosen(&self, items: &[Item], ids: &[String]) -> Result<Vec<String>, Status> {
        let mut uuids: Vec<String> = Vec::new();
        for id in ids {
            let item = items.iter().find(|i| i.id == *id);
            let item =
                item.ok_or_else(|| Status::not_found(format!("there is no {} {id}", self.plugin.resource)))?;
            if !uuids.contains(&item.uuid) {
                uuids.push(item.uuid.clone());
            }
        }
        let settings = &self.plugin.settings;
        if settings.replicas > 1 && settings.one_replica_a_container && ids.len() > 1 {
            return Err(Status::invalid_argument(format!(
                "a container may have one {} only: they are shares of GPUs, and more of them give it nothing more",
                self.plugin.resource
            )));
        }
        Ok(uuids)
    }

    #[allow(clippy::result_large_err, reason = "tonic's own type")]
    fn response(&self, uuids: &[String], spec: Option<&Spec>) -> Result<ContainerAllocateResponse, Status> {
        let mut answer = ContainerAllocateResponse::default();
        match self.plugin.settings.allocate {
            Allocate::Cdi => {
                let name = |uuid: &String| CdiDevice {
                    name: format!("{}={uuid}", self.plugin.kind),
                };
                answer.cdi_devices = uuids.iter().map(name).collect();
            }
            Allocate::Nodes => {
                let spec = spec.ok_or_else(|| Status::unavailable("the driver's files are not known yet"))?;
                let own = spec.devices.iter().filter(|d| uuids.contains(&d.name));
                let all: Vec<&ContainerEdits> = std::iter::once(&spec.container_edits)
                    .chain(own.map(|d| &d.container_edits))
                    .collect();
                if all.len() != uuids.len() + 1 {
                    return Err(Status::unavailable(
                        "the driver's files do not have all of these devices yet",
                    ));
                }
                as_nodes(&all, &mut answer);
            }
        }
        Ok(answer)
    }
}

/// CDI's edits in the API's own words.
fn as_nodes(all: &[&ContainerEdits], answer: &mut ContainerAllocateResponse) {
    let mut nodes = BTreeMap::new();
    for edits in all {
        for entry in &edits.env {
            if let Some((name, value)) = entry.split_once('=') {
                answer.envs.insert(name.to_owned(), value.to_owned());
            }
        }
        for node in &edits.device_nodes {
            let host = if node.host_path.is_empty() {
                &node.path
            } else {
                &node.host_path
            };
            nodes.insert(node.path.clone(), host.clone());
        }
        answer.mounts.extend(edits.mounts.iter().map(|m| Mount {
            container_path: m.container_path.clone(),
            host_path: m.host_path.clone(),
            read_only: m.options.iter().any(|o| o == "ro"),
        }));
    }
    answer.devices = nodes
        .into_iter()
        .map(|(container_path, host_path)| DeviceSpec {
            container_path,
            host_path,
            permissions: "rw".to_owned(),
        })
        .collect();
}
