//! What containers and pods use: asked of their shims now, except the size of writable layers, which takes long to count
//! and is remembered; a stale one is answered and counted anew behind the answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use futures_util::future::join_all;
use slipway_shim_client::pod as wire;
use slipway_snapshot::Usage;

use super::Container;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::pod::Pod;

/// The least time between two samples of a rate.
const SHORTEST_SAMPLE_NS: i64 = 100_000_000;

/// What was known last.
#[derive(Debug, Default)]
pub struct Samples {
    cpu: Option<CpuSample>,
    layer: Option<LayerSample>,
    counting: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at_ns: i64,
    usage_ns: u64,
    /// Between this sample and the one before.
    nano_cores: Option<u64>,
}

/// The size of a writable layer, and when it was counted.
#[derive(Debug, Clone, Copy)]
pub struct LayerSample {
    pub at_ns: i64,
    pub usage: Usage,
    counted: Instant,
}

/// One container's use.
pub struct ContainerStats {
    pub container: Arc<Container>,
    /// `None`: it does not live, or its shim does not answer.
    pub cgroup: Option<wire::CgroupStats>,
    pub nano_cores: Option<u64>,
    pub layer: Option<LayerSample>,
}

/// One pod's use.
pub struct PodStats {
    pub pod: Arc<Pod>,
    pub cgroup: Option<wire::CgroupStats>,
    pub containers: Vec<ContainerStats>,
}

/// The use of one container.
pub async fn of_container(daemon: &Arc<Daemon>, container: Arc<Container>) -> Result<ContainerStats, Error> {
    let pod = daemon.registry.pod(container.pod().as_str())?;
    let asked = of_containers(daemon, &pod, vec![container.clone()]).await;
    asked
        .containers
        .into_iter()
        .next()
        .ok_or_else(|| container.wrong_state("measure it"))
}

/// The use of some containers, grouped by pod and asked of all shims at once.
pub async fn of_many(daemon: &Arc<Daemon>, containers: Vec<Arc<Container>>) -> Vec<ContainerStats> {
    let mut by_pod: std::collections::BTreeMap<String, Vec<Arc<Container>>> = Default::default();
    for container in containers {
        by_pod
            .entry(container.pod().to_string())
            .or_default()
            .push(container);
    }
    let asked = by_pod.into_iter().filter_map(|(pod, containers)| {
        let pod = daemon.registry.pod(&pod).ok()?;
        Some(async move { of_containers(daemon, &pod, containers).await.containers })
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// The use of a pod with all its containers.
pub async fn of_pod(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> PodStats {
    let containers = daemon
        .registry
        .containers_of(pod.id())
        .into_iter()
        .filter(|c| !c.hidden())
        .collect();
    of_containers(daemon, pod, containers).await
}

async fn of_containers(daemon: &Arc<Daemon>, pod: &Arc<Pod>, containers: Vec<Arc<Container>>) -> PodStats {
    let answer = match pod.shim() {
        None => None,
        // All of them: one that has just ended would make a list of names fail.
        Some(shim) => match shim.stats(Vec::new()).await {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::debug!(pod = %pod.id(), %error, "the shim tells no statistics");
                None
            }
        },
    };
    let (mut cgroups, pod_cgroup) = answer.map(|a| (a.containers, a.pod)).unwrap_or_default();
    let mut stats = Vec::with_capacity(containers.len());
    for container in containers {
        let found = cgroups.iter().position(|c| c.id == container.id().as_str());
        let cgroup = found.map(|at| cgroups.swap_remove(at));
        let nano_cores = cgroup.as_ref().and_then(|c| rate(&container, c));
        let layer = layer(daemon, &container).await;
        stats.push(ContainerStats {
            container,
            cgroup,
            nano_cores,
            layer,
        });
    }
    PodStats {
        pod: pod.clone(),
        cgroup: pod_cgroup,
        containers: stats,
    }
}

/// CPU use since the last sample, in billionths of a core.
fn rate(container: &Container, now: &wire::CgroupStats) -> Option<u64> {
    let mut samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
    let last = samples.cpu;
    let next = next_sample(last, now.time_ns, now.cpu_usage_ns);
    samples.cpu = Some(next);
    next.nano_cores
}

fn next_sample(last: Option<CpuSample>, at_ns: i64, usage_ns: u64) -> CpuSample {
    let Some(last) = last else {
        return CpuSample {
            at_ns,
            usage_ns,
            nano_cores: None,
        };
    };
    let elapsed = at_ns.saturating_sub(last.at_ns);
    if elapsed < SHORTEST_SAMPLE_NS {
        return last;
    }
    let used = u128::from(usage_ns.saturating_sub(last.usage_ns));
    let rate = used * 1_000_000_000 / u128::from(elapsed.unsigned_abs());
    CpuSample {
        at_ns,
        usage_ns,
        nano_cores: Some(u64::try_from(rate).unwrap_or(u64::MAX)),
    }
}

/// The size of the writable layer as known; counted now only when it is not known at all.
async fn layer(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Option<LayerSample> {
    let (known, counting) = {
        let samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
        (samples.layer, samples.counting.clone())
    };
    match known {
        None => count(daemon, container).await,
        Some(sample) => {
            let stale = sample.counted.elapsed() > daemon.config.stats.layer_usage_max_age;
            if stale && !counting.swap(true, Ordering::AcqRel) {
                let (daemon, container) = (daemon.clone(), container.clone());
                let tasks = daemon.background.clone();
                tasks.spawn(async move {
                    count(&daemon, &container).await;
                    counting.store(false, Ordering::Release);
                });
            }
            Some(sample)
        }
    }
}

async fn count(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Option<LayerSample> {
    let (store, key) = (daemon.store.clone(), container.id().to_string());
    let counted = crate::blocking::run(move || {
        store
            .usage(&key)
            .map_err(Error::store("count a container's layer"))
    });
    match counted.await {
        Ok(usage) => {
            let sample = LayerSample {
                at_ns: crate::time::now_ns(),
                usage,
                counted: Instant::now(),
            };
            container
                .samples
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .layer = Some(sample);
            Some(sample)
        }
        Err(error) => {
            tracing::debug!(container = %container.id(), error = error.chain(), "its layer cannot be counted");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples_and_some_time_between_them() {
        let first = next_sample(None, 1_000_000_000, 500);
        assert_eq!(first.nano_cores, None);
        let second = next_sample(Some(first), 2_000_000_000, 250_000_500);
        assert_eq!(second.nano_cores, Some(250_000_000));
        let hurried = next_sample(Some(second), 2_000_000_001, 900_000_000);
        assert_eq!(hurried.nano_cores, Some(250_000_000), "the last rate stands");
    }
}
