//! A CRI client as kubelet is one: gRPC over the unix socket, 16 MiB answers, a deadline on every call.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use slipway_cri_api::v1::image_service_client::ImageServiceClient;
use slipway_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use slipway_cri_api::v1::{self as cri};
use tonic::transport::{Channel, Endpoint, Uri};

/// Both services of one runtime.
#[derive(Clone)]
pub struct Cri {
    /// `runtime.v1.RuntimeService`.
    pub runtime: RuntimeServiceClient<Channel>,
    /// `runtime.v1.ImageService`.
    pub image: ImageServiceClient<Channel>,
}

impl Cri {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect(path: &Path) -> Result<Cri> {
        let path: PathBuf = path.to_owned();
        let shown = path.display().to_string();
        let channel =
            Endpoint::try_from("http://localhost")?
                .timeout(Duration::from_secs(120))
                .connect_with_connector(tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move {
                        Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?))
                    }
                }))
                .await
                .with_context(|| format!("connecting to {shown}"))?;
        let max = 16 << 20;
        Ok(Cri {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(max),
            image: ImageServiceClient::new(channel).max_decoding_message_size(max),
        })
    }

    /// RunPodSandbox; the pod's id.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn run_pod(&self, config: cri::PodSandboxConfig) -> Result<String> {
        let r = cri::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        Ok(self
            .runtime
            .clone()
            .run_pod_sandbox(r)
            .await
            .context("RunPodSandbox")?
            .into_inner()
            .pod_sandbox_id)
    }

    /// CreateContainer; the container's id.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn create(
        &self,
        pod: &str,
        config: cri::ContainerConfig,
        sandbox: cri::PodSandboxConfig,
    ) -> Result<String> {
        let r = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        Ok(self
            .runtime
            .clone()
            .create_container(r)
            .await
            .context("CreateContainer")?
            .into_inner()
            .container_id)
    }

    /// StartContainer.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn start(&self, id: &str) -> Result<()> {
        let r = cri::StartContainerRequest {
            container_id: id.into(),
        };
        self.runtime
            .clone()
            .start_container(r)
            .await
            .context("StartContainer")?;
        Ok(())
    }

    /// Create and start in one go.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn run(
        &self,
        pod: &str,
        config: cri::ContainerConfig,
        sandbox: cri::PodSandboxConfig,
    ) -> Result<String> {
        let id = self.create(pod, config, sandbox).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// StopContainer with a grace period in seconds.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn stop(&self, id: &str, grace: i64) -> Result<()> {
        let r = cri::StopContainerRequest {
            container_id: id.into(),
            timeout: grace,
        };
        self.runtime
            .clone()
            .stop_container(r)
            .await
            .context("StopContainer")?;
        Ok(())
    }

    /// RemoveContainer.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let r = cri::RemoveContainerRequest {
            container_id: id.into(),
        };
        self.runtime
            .clone()
            .remove_container(r)
            .await
            .context("RemoveContainer")?;
        Ok(())
    }

    /// StopPodSandbox, then RemovePodSandbox.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let mut c = self.runtime.clone();
        c.stop_pod_sandbox(cri::StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        })
        .await
        .context("StopPodSandbox")?;
        c.remove_pod_sandbox(cri::RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        })
        .await
        .context("RemovePodSandbox")?;
        Ok(())
    }

    /// ContainerStatus without the verbose part.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn status(&self, id: &str) -> Result<cri::ContainerStatus> {
        let r = cri::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let s = self
            .runtime
            .clone()
            .container_status(r)
            .await
            .context("ContainerStatus")?
            .into_inner();
        s.status.context("ContainerStatus without a status")
    }

    /// PodSandboxStatus with the verbose part.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn pod_status(&self, id: &str) -> Result<cri::PodSandboxStatusResponse> {
        let r = cri::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: true,
        };
        Ok(self
            .runtime
            .clone()
            .pod_sandbox_status(r)
            .await
            .context("PodSandboxStatus")?
            .into_inner())
    }

    /// Waits until the container has exited; its last status.
    ///
    /// # Errors
    /// It has not within `limit`.
    pub async fn wait_exit(&self, id: &str, limit: Duration) -> Result<cri::ContainerStatus> {
        let began = Instant::now();
        loop {
            let s = self.status(id).await?;
            if s.state == cri::ContainerState::ContainerExited as i32 {
                return Ok(s);
            }
            if began.elapsed() > limit {
                bail!("container {id} has not exited within {limit:?}: {s:?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// ExecSync; exit code, stdout and stderr.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn exec(&self, id: &str, args: &[&str], timeout: i64) -> Result<(i32, String, String)> {
        let r = cri::ExecSyncRequest {
            container_id: id.into(),
            cmd: args.iter().map(|s| (*s).to_owned()).collect(),
            timeout,
        };
        let o = self
            .runtime
            .clone()
            .exec_sync(r)
            .await
            .with_context(|| format!("ExecSync {args:?}"))?
            .into_inner();
        let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
        Ok((o.exit_code, text(o.stdout.to_vec()), text(o.stderr.to_vec())))
    }

    /// Every pod the runtime lists.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn pods(&self) -> Result<Vec<cri::PodSandbox>> {
        let r = cri::ListPodSandboxRequest { filter: None };
        Ok(self
            .runtime
            .clone()
            .list_pod_sandbox(r)
            .await
            .context("ListPodSandbox")?
            .into_inner()
            .items)
    }

    /// Every container the runtime lists.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn containers(&self) -> Result<Vec<cri::Container>> {
        let r = cri::ListContainersRequest { filter: None };
        Ok(self
            .runtime
            .clone()
            .list_containers(r)
            .await
            .context("ListContainers")?
            .into_inner()
            .containers)
    }

    /// Every image the runtime lists.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn images(&self) -> Result<Vec<cri::Image>> {
        let r = cri::ListImagesRequest { filter: None };
        Ok(self
            .image
            .clone()
            .list_images(r)
            .await
            .context("ListImages")?
            .into_inner()
            .images)
    }

    /// PullImage; the image's id.
    ///
    /// # Errors
    /// As the runtime answers.
    pub async fn pull(&self, image: &str) -> Result<String> {
        let r = cri::PullImageRequest {
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(self
            .image
            .clone()
            .pull_image(r)
            .await
            .context("PullImage")?
            .into_inner()
            .image_ref)
    }
}

/// A pod's configuration as a test starts from: named, on the pod network unless `host_network`.
pub fn pod_config(name: &str, lab: &crate::Lab, host_network: bool) -> cri::PodSandboxConfig {
    let mode = if host_network {
        cri::NamespaceMode::Node
    } else {
        cri::NamespaceMode::Pod
    } as i32;
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: if host_network { String::new() } else { name.into() },
        log_directory: lab.join("logs").join(name).display().to_string(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: format!("{}/{name}", lab.cgroup()),
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: mode,
                    pid: cri::NamespaceMode::Container as i32,
                    ipc: cri::NamespaceMode::Pod as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's configuration as a test starts from: `image` running `command`.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: command.iter().map(|s| (*s).to_owned()).collect(),
        log_path: format!("{name}/0.log"),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..Default::default()
    }
}

/// Gives a pod users of its own; what its containers have to ask for too.
pub fn own_users(config: &mut cri::PodSandboxConfig) -> cri::UserNamespace {
    let map = cri::IdMapping {
        host_id: 1_000_000,
        container_id: 0,
        length: 65536,
    };
    let user = cri::UserNamespace {
        mode: cri::NamespaceMode::Pod as i32,
        uids: vec![map],
        gids: vec![map],
    };
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(user.clone());
    user
}
