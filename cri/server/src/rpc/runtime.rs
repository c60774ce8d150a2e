//! The runtime service: decode, call, encode.

use std::sync::Arc;
use std::time::Duration;

use slipway_cri_api::v1;
use slipway_cri_api::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status, async_trait};
use tracing::info_span;

use super::decode::clip;
use super::decode::filter::{container_filter, pod_filter, pod_stats_filter, stats_filter};
use super::stream::{Parts, parts, parts_of};
use super::{Cri, call, decode, encode, events, metrics, node};
use crate::container::{self, stats};
use crate::error::Error;
use crate::{pod, pod_cidr};

type Answer<T> = Result<Response<T>, Status>;

fn unimplemented<T>(what: &'static str) -> Answer<T> {
    Err(super::status::from(&Error::Unimplemented { what }))
}

impl Cri {
    pub(super) fn pod(&self, id: String) -> Result<Arc<pod::Pod>, Error> {
        self.daemon.visible_pod(&decode::id("pod_sandbox_id", id)?)
    }

    fn container(&self, id: String) -> Result<Arc<container::Container>, Error> {
        self.daemon.visible_container(&decode::id("container_id", id)?)
    }

    /// The kubelet has edited the pod's cgroup itself; what is left is to remember.
    async fn note_pod_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<v1::UpdatePodSandboxResourcesResponse, Error> {
        let pod = self.pod(request.pod_sandbox_id)?;
        let checked = |field, asked: Option<v1::LinuxContainerResources>| {
            let checked = asked.as_ref().map(|r| decode::resources(field, r)).transpose();
            checked.map(Option::unwrap_or_default)
        };
        let overhead = checked("overhead", request.overhead)?;
        let resources = checked("resources", request.resources)?;
        let daemon = self.daemon.clone();
        let noted = async move {
            pod.transition(&daemon.records, |state| {
                state.resources = Some((overhead, resources));
                true
            })
            .await
        };
        self.daemon.to_the_end(noted).await?;
        Ok(v1::UpdatePodSandboxResourcesResponse {})
    }

    fn pods(&self, filter: &pod::list::Filter) -> Result<Vec<v1::PodSandbox>, Error> {
        Ok(pod::list::list(&self.daemon, filter)?
            .iter()
            .map(|p| encode::pod(p))
            .collect())
    }

    fn containers(&self, filter: &container::list::Filter) -> Result<Vec<v1::Container>, Error> {
        Ok(container::list::list(&self.daemon, filter)?
            .iter()
            .map(|c| encode::container(c))
            .collect())
    }
}

#[async_trait]
impl RuntimeService for Cri {
    type StreamPodSandboxesStream = Parts<v1::StreamPodSandboxesResponse>;
    type StreamContainersStream = Parts<v1::StreamContainersResponse>;
    type StreamContainerStatsStream = Parts<v1::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Parts<v1::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Parts<v1::StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = super::events::Told;

    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(node::version()))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let verbose = request.into_inner().verbose;
        call(info_span!("Status"), async {
            Ok(node::status(&self.daemon, verbose))
        })
        .await
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(node::runtime_config(&self.daemon)))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request
            .into_inner()
            .runtime_config
            .and_then(|c| c.network_config)
            .unwrap_or_default();
        call(info_span!("UpdateRuntimeConfig"), async {
            let pod_cidr = decode::name("runtime_config.network_config.pod_cidr", network.pod_cidr)?;
            let daemon = self.daemon.clone();
            let told = async move { pod_cidr::update(&daemon, pod_cidr).await };
            self.daemon.to_the_end(told).await?;
            Ok(v1::UpdateRuntimeConfigResponse {})
        })
        .await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let name = request
            .config
            .as_ref()
            .and_then(|c| c.metadata.as_ref())
            .map(|m| clip(&m.name).to_owned());
        call(info_span!("RunPodSandbox", name), async {
            let config = decode::pod_config(
                request.config,
                request.runtime_handler,
                &self.daemon.config.runtime,
            )?;
            let daemon = self.daemon.clone();
            let id = self
                .daemon
                .to_the_end(async move { pod::run::run(&daemon, config).await })
                .await?;
            Ok(v1::RunPodSandboxResponse {
                pod_sandbox_id: id.to_string(),
            })
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call(info_span!("StopPodSandbox", pod = clip(&id)), async {
            let (daemon, id) = (self.daemon.clone(), decode::id("pod_sandbox_id", id)?);
            self.daemon
                .to_the_end(async move { pod::stop::stop(&daemon, &id).await })
                .await?;
            Ok(v1::StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call(info_span!("RemovePodSandbox", pod = clip(&id)), async {
            let (daemon, id) = (self.daemon.clone(), decode::id("pod_sandbox_id", id)?);
            self.daemon
                .to_the_end(async move { pod::remove::remove(&daemon, &id).await })
                .await?;
            Ok(v1::RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        call(
            info_span!("PodSandboxStatus", pod = clip(&request.pod_sandbox_id)),
            async {
                let pod = self.pod(request.pod_sandbox_id)?;
                pod.known.wait(pod.id().as_str()).await?;
                let filter = container::list::Filter {
                    pod: pod.id().to_string(),
                    ..Default::default()
                };
                let containers = container::list::list(&self.daemon, &filter)?;
                let info = request
                    .verbose
                    .then(|| encode::info(&pod::status::verbose(&self.daemon, &pod)));
                Ok(v1::PodSandboxStatusResponse {
                    status: Some(encode::pod_status(&pod)),
                    info: info.unwrap_or_default(),
                    containers_statuses: containers.iter().map(|c| encode::container_status(c)).collect(),
                    // 0 sends every kubelet to ListContainers and ContainerStatus for a pod's containers, as it goes where the
                    // gate EventedPLEG is off, with the time at which it had begun to ask. A time of ours would have it take the
                    // statuses above for all that it needs: up to 1.37.1 (GetPodStatus) it then does not note which of them are
                    // the living sandbox's, and runs init containers again. The statuses themselves are for crictl.
                    timestamp: 0,
                })
            },
        )
        .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        let filter = request.into_inner().filter;
        call(info_span!("ListPodSandbox"), async {
            Ok(v1::ListPodSandboxResponse {
                items: self.pods(&pod_filter(filter)?)?,
            })
        })
        .await
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let filter = request.into_inner().filter;
        let pods = call(info_span!("StreamPodSandboxes"), async {
            self.pods(&pod_filter(filter)?)
        })
        .await?
        .into_inner();
        Ok(parts(pods, |pod_sandboxes| v1::StreamPodSandboxesResponse {
            pod_sandboxes,
        }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let name = request
            .config
            .as_ref()
            .and_then(|c| c.metadata.as_ref())
            .map(|m| clip(&m.name).to_owned());
        call(
            info_span!("CreateContainer", pod = clip(&request.pod_sandbox_id), name),
            async {
                let config = decode::container_config(request.config)?;
                decode::sandbox_config(request.sandbox_config)?;
                let daemon = self.daemon.clone();
                let pod = decode::id("pod_sandbox_id", request.pod_sandbox_id)?;
                let created = async move { container::create::create(&daemon, &pod, config).await };
                let id = self.daemon.to_the_end(created).await?;
                Ok(v1::CreateContainerResponse {
                    container_id: id.to_string(),
                })
            },
        )
        .await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("StartContainer", container = clip(&id)), async {
            let (daemon, id) = (self.daemon.clone(), decode::id("container_id", id)?);
            self.daemon
                .to_the_end(async move { container::start::start(&daemon, &id).await })
                .await?;
            Ok(v1::StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let v1::StopContainerRequest {
            container_id: id,
            timeout,
        } = request.into_inner();
        call(
            info_span!("StopContainer", container = clip(&id), timeout),
            async {
                let grace = Duration::from_secs(decode::seconds("timeout", timeout)?);
                let (daemon, id) = (self.daemon.clone(), decode::id("container_id", id)?);
                self.daemon
                    .to_the_end(async move { container::stop::stop(&daemon, &id, grace).await })
                    .await?;
                Ok(v1::StopContainerResponse {})
            },
        )
        .await
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("RemoveContainer", container = clip(&id)), async {
            let (daemon, id) = (self.daemon.clone(), decode::id("container_id", id)?);
            self.daemon
                .to_the_end(async move { container::remove::remove(&daemon, &id).await })
                .await?;
            Ok(v1::RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let filter = request.into_inner().filter;
        call(info_span!("ListContainers"), async {
            Ok(v1::ListContainersResponse {
                containers: self.containers(&container_filter(filter)?)?,
            })
        })
        .await
    }

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let filter = request.into_inner().filter;
        let listed = async { self.containers(&container_filter(filter)?) };
        let found = call(info_span!("StreamContainers"), listed).await?.into_inner();
        Ok(parts(found, |containers| v1::StreamContainersResponse {
            containers,
        }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        call(
            info_span!("ContainerStatus", container = clip(&request.container_id)),
            async {
                let container = self.container(request.container_id)?;
                container::status::wait_known(&self.daemon, &container).await?;
                let status = Some(encode::container_status(&container));
                let mut info = Default::default();
                if request.verbose {
                    let daemon = self.daemon.clone();
                    let read = move || Ok(encode::info(&container::status::verbose(&daemon, &container)));
                    info = crate::blocking::run(read).await?;
                }
                Ok(v1::ContainerStatusResponse { status, info })
            },
        )
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let id = request.container_id;
        call(
            info_span!("UpdateContainerResources", container = clip(&id)),
            async {
                let change = request
                    .linux
                    .ok_or_else(|| Error::invalid("linux", "is missing"))?;
                decode::annotations("annotations", request.annotations)?;
                let (daemon, id) = (self.daemon.clone(), decode::id("container_id", id)?);
                let change = decode::resources("linux", &change)?;
                let updated = async move { container::update::update(&daemon, &id, change).await };
                self.daemon.to_the_end(updated).await?;
                Ok(v1::UpdateContainerResourcesResponse {})
            },
        )
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let span = info_span!("UpdatePodSandboxResources", pod = clip(&request.pod_sandbox_id));
        call(span, self.note_pod_resources(request)).await
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("ReopenContainerLog", container = clip(&id)), async {
            let (daemon, id) = (self.daemon.clone(), decode::id("container_id", id)?);
            self.daemon
                .to_the_end(async move { container::logs::reopen(&daemon, &id).await })
                .await?;
            Ok(v1::ReopenContainerLogResponse {})
        })
        .await
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let v1::ExecSyncRequest {
            container_id: id,
            cmd,
            timeout,
        } = request.into_inner();
        call(info_span!("ExecSync", container = clip(&id)), async {
            let (id, cmd) = (decode::id("container_id", id)?, decode::command(cmd)?);
            let timeout = Duration::from_secs(decode::seconds("timeout", timeout)?);
            let output = container::exec::exec_sync(&self.daemon, &id, cmd, timeout).await?;
            Ok(v1::ExecSyncResponse {
                stdout: output.stdout,
                stderr: output.stderr,
                exit_code: output.code,
            })
        })
        .await
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("ContainerStats", container = clip(&id)), async {
            let container = self.container(id)?;
            let measured = stats::of_container(&self.daemon, container).await?;
            Ok(v1::ContainerStatsResponse {
                stats: Some(encode::container_stats(&measured, &self.layers())),
            })
        })
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let filter = request.into_inner().filter;
        call(info_span!("ListContainerStats"), async {
            let stats = self.stats(&stats_filter(filter)?).await?;
            Ok(v1::ListContainerStatsResponse { stats })
        })
        .await
    }

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter;
        let measured = async { self.stats(&stats_filter(filter)?).await };
        let found = call(info_span!("StreamContainerStats"), measured)
            .await?
            .into_inner();
        Ok(parts(found, |container_stats| v1::StreamContainerStatsResponse {
            container_stats,
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call(info_span!("PodSandboxStats", pod = clip(&id)), async {
            let pod = self.pod(id)?;
            Ok(v1::PodSandboxStatsResponse {
                stats: Some(self.measured_pod(&pod).await),
            })
        })
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter;
        call(info_span!("ListPodSandboxStats"), async {
            let stats = self.measured_pods(&pod_stats_filter(filter)?).await?;
            Ok(v1::ListPodSandboxStatsResponse { stats })
        })
        .await
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter;
        let measured = async { self.measured_pods(&pod_stats_filter(filter)?).await };
        let found = call(info_span!("StreamPodSandboxStats"), measured)
            .await?
            .into_inner();
        Ok(parts(found, |pod_sandbox_stats| {
            v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let request = request.into_inner();
        let span = info_span!("Exec", container = clip(&request.container_id));
        call(span, async { self.exec_url(request) }).await
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let request = request.into_inner();
        let span = info_span!("Attach", container = clip(&request.container_id));
        call(span, async { self.attach_url(request) }).await
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let request = request.into_inner();
        let span = info_span!("PortForward", pod = clip(&request.pod_sandbox_id));
        call(span, async { self.port_forward_url(request) }).await
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        unimplemented("CheckpointContainer")
    }

    async fn checkpoint_pod(
        &self,
        _: Request<v1::CheckpointPodRequest>,
    ) -> Answer<v1::CheckpointPodResponse> {
        unimplemented("CheckpointPod")
    }

    async fn restore_pod(&self, _: Request<v1::RestorePodRequest>) -> Answer<v1::RestorePodResponse> {
        unimplemented("RestorePod")
    }

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        call(info_span!("GetContainerEvents"), async {
            events::listen(&self.daemon)
        })
        .await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        let descriptors = metrics::descriptors();
        Ok(Response::new(v1::ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        call(info_span!("ListPodSandboxMetrics"), async {
            let pod_metrics = self.metrics().await?;
            Ok(v1::ListPodSandboxMetricsResponse { pod_metrics })
        })
        .await
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let found = call(info_span!("StreamPodSandboxMetrics"), self.metrics())
            .await?
            .into_inner();
        // Each pod has hundreds.
        Ok(parts_of(32, found, |pod_sandbox_metrics| {
            v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }
        }))
    }
}
