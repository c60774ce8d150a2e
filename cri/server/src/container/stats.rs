//! What containers and pods use: asked of their shims now, except the size of writable layers, which takes long to count.
//! Layers are counted behind the answer, a few at a time, and what is known is answered: nobody waits for a tree to be
//! walked for more than [`PATIENCE`]. Large trees are walked one after the other, and small ones beside them: what is told of a
//! small one is older than the configuration's age by the walks of other small ones at most, of a large one by those of all the
//! large. Where the disk has filled or emptied meanwhile, somebody may be about to choose a victim by these figures: then a
//! layer is counted before the answer, unless it was just now, or is so large that it would have to be walked all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use slipway_shim_client::pod as wire;
use slipway_snapshot::Usage;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::{Container, volumes};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
use crate::pod::Pod;

/// The least time between two samples of a rate.
const SHORTEST_SAMPLE_NS: i64 = 100_000_000;
/// How long an answer waits, all containers together, for layers of which nothing is known yet. Small ones are counted
/// by then; a large one is told of the next time.
const PATIENCE: Duration = Duration::from_millis(100);
/// By how much the disk's use has to differ for figures to be old before their time.
const NOTICEABLE: u64 = 8 << 20;
/// A layer is counted again after a second at the earliest, and after this many times what its last count took.
const SOONEST: Duration = Duration::from_secs(1);
const PER_COUNT: u32 = 50;
/// A count that took this long is a long one, and the next of the same layer will be too.
const LONG: Duration = Duration::from_secs(1);
static COUNTING: Turns = Turns::new();

/// Whose turn it is to count. Two layers at once, so that statistics do not take the disk from the containers; of these one
/// that is known to take long, so that the others do not wait for it.
struct Turns {
    all: Semaphore,
    long: Semaphore,
}

impl Turns {
    const fn new() -> Turns {
        Turns {
            all: Semaphore::const_new(2),
            long: Semaphore::const_new(1),
        }
    }

    /// Waits for one's turn, which ends when this is dropped.
    async fn take(
        &self,
        is_long: bool,
    ) -> Result<(Option<SemaphorePermit<'_>>, SemaphorePermit<'_>), AcquireError> {
        let long = match is_long {
            true => Some(self.long.acquire().await?),
            false => None,
        };
        Ok((long, self.all.acquire().await?))
    }
}

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
    took: Duration,
    /// Bytes of the disk that were in use.
    disk: u64,
}

/// Whether a layer is to be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    No,
    Behind,
    First,
}

impl LayerSample {
    fn due(&self, age: Duration, disk: u64, max_age: Duration) -> Due {
        if disk.abs_diff(self.disk) >= NOTICEABLE && age >= SOONEST.max(self.took * PER_COUNT) {
            Due::First
        } else if age > max_age {
            Due::Behind
        } else {
            Due::No
        }
    }
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
    pub nano_cores: Option<u64>,
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
        let nano_cores = cgroup.as_ref().and_then(|c| rate(&container.samples, c));
        stats.push(ContainerStats {
            container,
            cgroup,
            nano_cores,
            layer: None,
        });
    }
    let disk = disk_use(daemon).await;
    let until = tokio::time::Instant::now() + PATIENCE;
    let layers = stats.iter().map(|s| layer(daemon, &s.container, disk, until));
    for (layer, stats) in join_all(layers).await.into_iter().zip(&mut stats) {
        stats.layer = layer;
    }
    PodStats {
        pod: pod.clone(),
        nano_cores: pod_cgroup.as_ref().and_then(|c| rate(&pod.samples, c)),
        cgroup: pod_cgroup,
        containers: stats,
    }
}

/// CPU use since the last sample, in billionths of a core.
fn rate(samples: &Mutex<Samples>, now: &wire::CgroupStats) -> Option<u64> {
    let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Bytes in use where the layers lie; 0: nobody can tell.
async fn disk_use(daemon: &Daemon) -> u64 {
    let root = daemon.paths.root.clone();
    let asked = crate::blocking::run(move || {
        rustix::fs::statvfs(&root).map_err(|e| Error::io("measure the file system of", &root)(e.into()))
    });
    asked
        .await
        .map_or(0, |fs| fs.f_blocks.saturating_sub(fs.f_bfree) * fs.f_frsize)
}

/// The size of the writable layer as known. It is counted behind the answer when that is old; when nothing is known, or
/// the disk has changed, the count is waited for a little.
async fn layer(
    daemon: &Arc<Daemon>,
    container: &Arc<Container>,
    disk: u64,
    until: tokio::time::Instant,
) -> Option<LayerSample> {
    let (known, counting) = {
        let samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
        (samples.layer, samples.counting.clone())
    };
    let max_age = daemon.config.stats.layer_usage_max_age;
    let due = known.map_or(Due::First, |s| s.due(s.counted.elapsed(), disk, max_age));
    if due == Due::No || counting.swap(true, Ordering::AcqRel) {
        return known;
    }
    let (behind, whose) = (daemon.clone(), container.clone());
    let counted = daemon.background.spawn(async move {
        count(&behind, &whose, disk).await;
        counting.store(false, Ordering::Release);
    });
    if due == Due::Behind || tokio::time::timeout_at(until, counted).await.is_err() {
        return known;
    }
    let samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
    samples.layer
}

/// Counts the writable layer and the anonymous volumes, which lie on the same file system and are the container's too.
async fn count(daemon: &Arc<Daemon>, container: &Arc<Container>, disk: u64) {
    let is_long = {
        let samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
        // One that was never counted is most often new, and empty.
        samples.layer.is_some_and(|s| s.took >= LONG)
    };
    let Ok(_turn) = COUNTING.take(is_long).await else {
        return;
    };
    let began = Instant::now();
    let (store, volumes, id) = (
        daemon.store.clone(),
        daemon.paths.volumes.clone(),
        container.id().clone(),
    );
    let counted = crate::blocking::run(move || {
        fail::blocking_point("container_stats.count_layer")?;
        let layer = store
            .usage(id.as_str())
            .map_err(Error::store("count a container's layer"))?;
        let volumes = volumes::usage(&volumes, &id)?;
        Ok(Usage {
            bytes: layer.bytes + volumes.bytes,
            inodes: layer.inodes + volumes.inodes,
        })
    });
    match counted.await {
        Ok(usage) => {
            let sample = LayerSample {
                at_ns: crate::time::now_ns(),
                usage,
                counted: Instant::now(),
                took: began.elapsed(),
                disk,
            };
            let mut samples = container.samples.lock().unwrap_or_else(PoisonError::into_inner);
            samples.layer = Some(sample);
        }
        Err(error) => {
            tracing::debug!(container = %container.id(), error = error.chain(), "its layer cannot be counted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn layers_that_take_long_wait_for_each_other_and_not_the_others_for_them() {
        use std::pin::pin;
        let turns = Turns::new();
        let first = turns.take(true).await.unwrap();
        let mut second = pin!(turns.take(true));
        for _ in 0..5 {
            let at_once = Duration::from_secs(5);
            let short = tokio::time::timeout(at_once, turns.take(false)).await;
            let short = short.expect("a short one has its turn").unwrap();
            assert!(futures_util::poll!(second.as_mut()).is_pending());
            assert!(
                futures_util::poll!(pin!(turns.take(false))).is_pending(),
                "two at once"
            );
            drop(short);
        }
        drop(first);
        drop(second.await.unwrap());
    }

    #[test]
    fn a_rate_needs_two_samples_and_some_time_between_them() {
        let first = next_sample(None, 1_000_000_000, 500);
        assert_eq!(first.nano_cores, None);
        let second = next_sample(Some(first), 2_000_000_000, 250_000_500);
        assert_eq!(second.nano_cores, Some(250_000_000));
        let hurried = next_sample(Some(second), 2_000_000_001, 900_000_000);
        assert_eq!(hurried.nano_cores, Some(250_000_000), "the last rate stands");
    }

    #[test]
    fn a_layer_is_counted_before_its_time_when_the_disk_fills() {
        let sample = |took| LayerSample {
            at_ns: 0,
            usage: Usage::default(),
            counted: Instant::now(),
            took: Duration::from_millis(took),
            disk: 1 << 30,
        };
        let age = Duration::from_secs(30);
        let due = |took, after: u64, disk| sample(took).due(Duration::from_secs(after), disk, age);
        let (same, more, less) = ((1 << 30) + 4096, (1 << 30) + NOTICEABLE, (1 << 30) - NOTICEABLE);
        assert_eq!(due(1, 29, same), Due::No);
        assert_eq!(due(1, 31, same), Due::Behind);
        assert_eq!(due(1, 2, more), Due::First);
        assert_eq!(due(1, 2, less), Due::First, "what was deleted is somebody's too");
        assert_eq!(due(1, 0, more), Due::No, "it was counted just now");
        assert_eq!(due(400, 19, more), Due::No, "it takes too long for that");
        assert_eq!(due(400, 21, more), Due::First);
        assert_eq!(due(4000, 31, more), Due::Behind);
    }
}
