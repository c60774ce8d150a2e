//! The runtime service: decode, call, encode.

use std::time::Duration;

use slipway_cri_api::v1;
use slipway_cri_api::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status, async_trait};
use tracing::info_span;

use super::stream::{Parts, parts, parts_of};
use super::{Cri, call, decode, encode, events, metrics, node};
use crate::container::{self, command, list::Visible, processes, stats};
use crate::error::Error;
use crate::{pod, pod_cidr};

type Answer<T> = Result<Response<T>, Status>;

fn unimplemented<T>(what: &'static str) -> Answer<T> {
    Err(super::status::from(&Error::Unimplemented { what }))
}

fn pod_filter(filter: Option<v1::PodSandboxFilter>) -> Result<pod::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    let state = filter
        .state
        .map(|s| decode::known("filter.state", s.state))
        .transpose()?;
    Ok(pod::list::Filter {
        id: filter.id,
        ready: state.map(|s: v1::PodSandboxState| s == v1::PodSandboxState::SandboxReady),
        labels: decode::string_map(filter.label_selector),
    })
}

fn container_filter(filter: Option<v1::ContainerFilter>) -> Result<container::list::Filter, Error> {
    let filter = filter.unwrap_or_default();
    let state = filter
        .state
        .map(|s| decode::known("filter.state", s.state))
        .transpose()?;
    Ok(container::list::Filter {
        id: filter.id,
        pod: filter.pod_sandbox_id,
        state: state.map(|s| match s {
            v1::ContainerState::ContainerCreated => Visible::Created,
            v1::ContainerState::ContainerRunning => Visible::Running,
            v1::ContainerState::ContainerExited => Visible::Exited,
            v1::ContainerState::ContainerUnknown => Visible::Unknown,
        }),
        labels: decode::string_map(filter.label_selector),
    })
}

fn stats_filter(filter: Option<v1::ContainerStatsFilter>) -> container::list::Filter {
    let filter = filter.unwrap_or_default();
    container::list::Filter {
        id: filter.id,
        pod: filter.pod_sandbox_id,
        state: None,
        labels: decode::string_map(filter.label_selector),
    }
}

fn pod_stats_filter(filter: Option<v1::PodSandboxStatsFilter>) -> pod::list::Filter {
    let filter = filter.unwrap_or_default();
    pod::list::Filter {
        id: filter.id,
        ready: None,
        labels: decode::string_map(filter.label_selector),
    }
}

/// The file system of a directory, by its device.
fn file_system(dir: &std::path::Path) -> Option<metrics::FileSystem> {
    let stat = rustix::fs::stat(dir).ok()?;
    let fs = rustix::fs::statvfs(dir).ok()?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    Some(metrics::FileSystem {
        device: metrics::device_name(major.into(), minor.into()),
        bytes: fs.f_blocks * fs.f_frsize,
        inodes: fs.f_files,
        inodes_free: fs.f_ffree,
    })
}

impl Cri {
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

    /// Where writable layers lie: as ImageFsInfo names it.
    fn layers(&self) -> String {
        self.daemon.paths.root.to_string_lossy().into_owned()
    }

    async fn stats(&self, filter: &container::list::Filter) -> Result<Vec<v1::ContainerStats>, Error> {
        let mut found = container::list::list(&self.daemon, filter)?;
        found.retain(|container| container.live());
        let measured = stats::of_many(&self.daemon, found).await;
        Ok(measured
            .iter()
            .map(|s| encode::container_stats(s, &self.layers()))
            .collect())
    }

    async fn measured_pods(&self, filter: &pod::list::Filter) -> Result<Vec<v1::PodSandboxStats>, Error> {
        let mut found = pod::list::list(&self.daemon, filter)?;
        found.retain(|pod| pod.shim().is_some());
        Ok(futures_util::future::join_all(found.iter().map(|pod| self.measured_pod(pod))).await)
    }

    async fn metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>, Error> {
        let mut found = pod::list::list(&self.daemon, &Default::default())?;
        found.retain(|pod| pod.shim().is_some());
        let measured = futures_util::future::join_all(found.iter().map(|pod| self.measure(pod))).await;
        Ok(measured.iter().map(metrics::of_pod).collect())
    }

    async fn measure(&self, pod: &std::sync::Arc<pod::Pod>) -> metrics::Measured {
        let stats = stats::of_pod(&self.daemon, pod).await;
        let mut asked = Vec::with_capacity(stats.containers.len());
        for container in &stats.containers {
            let pids = match pod.shim().filter(|_| container.cgroup.is_some()) {
                Some(shim) => shim.pids(container.container.id().as_str()).await.ok(),
                None => None,
            };
            asked.push((container.container.state().made.pid, pids));
        }
        let root = self.daemon.paths.root.clone();
        let looked = crate::blocking::run(move || {
            let look = |(init, pids): (u32, Option<Vec<u32>>)| Some(processes::look(init, &pids?));
            Ok((asked.into_iter().map(look).collect(), file_system(&root)))
        });
        let (processes, file_system) = looked.await.unwrap_or_default();
        metrics::Measured {
            interfaces: pod::stats::interfaces(pod).await,
            // As a path, where the kubelet gave one.
            cgroup: match &pod.record().config.cgroup_parent {
                Some(path) => path.clone(),
                None => pod::run::cgroup_parent(&self.daemon, pod),
            },
            stats,
            processes,
            file_system,
        }
    }

    async fn measured_pod(&self, pod: &std::sync::Arc<pod::Pod>) -> v1::PodSandboxStats {
        let measured = stats::of_pod(&self.daemon, pod).await;
        encode::pod_stats(&measured, &pod::stats::interfaces(pod).await, &self.layers())
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
            let daemon = self.daemon.clone();
            let told = async move { pod_cidr::update(&daemon, network.pod_cidr).await };
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
            .map(|m| m.name.clone());
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
        call(info_span!("StopPodSandbox", pod = id), async {
            let daemon = self.daemon.clone();
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
        call(info_span!("RemovePodSandbox", pod = id), async {
            let daemon = self.daemon.clone();
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
            info_span!("PodSandboxStatus", pod = request.pod_sandbox_id),
            async {
                let pod = self.daemon.visible_pod(&request.pod_sandbox_id)?;
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
                    timestamp: crate::time::now_ns(),
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
            .map(|m| m.name.clone());
        call(
            info_span!("CreateContainer", pod = request.pod_sandbox_id, name),
            async {
                let config = decode::container_config(request.config)?;
                let (daemon, pod) = (self.daemon.clone(), request.pod_sandbox_id);
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
        call(info_span!("StartContainer", container = id), async {
            let daemon = self.daemon.clone();
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
        call(info_span!("StopContainer", container = id, timeout), async {
            let grace = Duration::from_secs(decode::seconds("timeout", timeout)?);
            let daemon = self.daemon.clone();
            self.daemon
                .to_the_end(async move { container::stop::stop(&daemon, &id, grace).await })
                .await?;
            Ok(v1::StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("RemoveContainer", container = id), async {
            let daemon = self.daemon.clone();
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
            info_span!("ContainerStatus", container = request.container_id),
            async {
                let container = self.daemon.visible_container(&request.container_id)?;
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
        call(info_span!("UpdateContainerResources", container = id), async {
            let change = request
                .linux
                .ok_or_else(|| Error::invalid("linux", "is missing"))?;
            let (daemon, change) = (self.daemon.clone(), decode::resources("linux", &change)?);
            let updated = async move { container::update::update(&daemon, &id, change).await };
            self.daemon.to_the_end(updated).await?;
            Ok(v1::UpdateContainerResourcesResponse {})
        })
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let id = request.pod_sandbox_id;
        call(info_span!("UpdatePodSandboxResources", pod = id), async {
            let pod = self.daemon.visible_pod(&id)?;
            let overhead = request
                .overhead
                .as_ref()
                .map(|r| decode::resources("overhead", r))
                .transpose()?
                .unwrap_or_default();
            let resources = request
                .resources
                .as_ref()
                .map(|r| decode::resources("resources", r))
                .transpose()?
                .unwrap_or_default();
            // The kubelet has edited the pod's cgroup itself; what is left is to remember.
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
        })
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        call(info_span!("ReopenContainerLog", container = id), async {
            let daemon = self.daemon.clone();
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
        call(info_span!("ExecSync", container = id), async {
            let cmd = decode::command(cmd)?;
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
        call(info_span!("ContainerStats", container = id), async {
            let container = self.daemon.visible_container(&id)?;
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
        let filter = stats_filter(request.into_inner().filter);
        call(info_span!("ListContainerStats"), async {
            Ok(v1::ListContainerStatsResponse {
                stats: self.stats(&filter).await?,
            })
        })
        .await
    }

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = stats_filter(request.into_inner().filter);
        let found = call(info_span!("StreamContainerStats"), self.stats(&filter))
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
        call(info_span!("PodSandboxStats", pod = id), async {
            let pod = self.daemon.visible_pod(&id)?;
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
        let filter = pod_stats_filter(request.into_inner().filter);
        call(info_span!("ListPodSandboxStats"), async {
            Ok(v1::ListPodSandboxStatsResponse {
                stats: self.measured_pods(&filter).await?,
            })
        })
        .await
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let filter = pod_stats_filter(request.into_inner().filter);
        let found = call(info_span!("StreamPodSandboxStats"), self.measured_pods(&filter))
            .await?
            .into_inner();
        Ok(parts(found, |pod_sandbox_stats| {
            v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let request = request.into_inner();
        call(info_span!("Exec", container = request.container_id), async {
            let cmd = decode::command(request.cmd)?;
            let container = command::running(&self.daemon, &request.container_id, "run a command in it")?.0;
            let url = self.urls.exec(slipway_stream::ExecRequest {
                container: container.id().to_string(),
                command: cmd,
                tty: request.tty,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            })?;
            Ok(v1::ExecResponse { url })
        })
        .await
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let request = request.into_inner();
        call(info_span!("Attach", container = request.container_id), async {
            let container = command::running(&self.daemon, &request.container_id, "attach to it")?.0;
            let url = self.urls.attach(slipway_stream::AttachRequest {
                container: container.id().to_string(),
                tty: request.tty,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            })?;
            Ok(v1::AttachResponse { url })
        })
        .await
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        // The ports it names are those the client will ask for: it is then that they are connected to.
        let id = request.into_inner().pod_sandbox_id;
        call(info_span!("PortForward", pod = id), async {
            let pod = self.daemon.visible_pod(&id)?;
            pod.ready("forward a connection to it")?;
            let pod = pod.id().to_string();
            let url = self
                .urls
                .port_forward(slipway_stream::PortForwardRequest { pod })?;
            Ok(v1::PortForwardResponse { url })
        })
        .await
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
