//! Statistics and metrics, gathered for whichever call asks for them.

use slipway_cri_api::v1;

use super::{Cri, encode, metrics};
use crate::container::{self, processes, stats};
use crate::error::Error;
use crate::pod;

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
    /// Where writable layers lie: as ImageFsInfo names it.
    pub(super) fn layers(&self) -> String {
        self.daemon.paths.root.to_string_lossy().into_owned()
    }

    pub(super) async fn stats(
        &self,
        filter: &container::list::Filter,
    ) -> Result<Vec<v1::ContainerStats>, Error> {
        let mut found = container::list::list(&self.daemon, filter)?;
        found.retain(|container| container.live());
        let measured = stats::of_many(&self.daemon, found).await;
        Ok(measured
            .iter()
            .map(|s| encode::container_stats(s, &self.layers()))
            .collect())
    }

    pub(super) async fn measured_pods(
        &self,
        filter: &pod::list::Filter,
    ) -> Result<Vec<v1::PodSandboxStats>, Error> {
        let mut found = pod::list::list(&self.daemon, filter)?;
        found.retain(|pod| pod.shim().is_some());
        Ok(futures_util::future::join_all(found.iter().map(|pod| self.measured_pod(pod))).await)
    }

    pub(super) async fn metrics(&self) -> Result<Vec<v1::PodSandboxMetrics>, Error> {
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

    pub(super) async fn measured_pod(&self, pod: &std::sync::Arc<pod::Pod>) -> v1::PodSandboxStats {
        let measured = stats::of_pod(&self.daemon, pod).await;
        encode::pod_stats(&measured, &pod::stats::interfaces(pod).await, &self.layers())
    }
}
