//! StopPodSandbox: kill everything, give the network back, let the shim go. Idempotent, and the same after a crash.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{Error as ShimError, Shim};

use super::dir::PodDir;
use super::{Pod, network, watch};
use crate::container::exit;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::records::PodPhase;

const VERB: &str = "StopPodSandbox";
/// How long a shim may take to be gone after it said it would.
const GONE: Duration = Duration::from_secs(5);

/// Stops a pod. One that is stopped or gone is fine.
pub async fn stop(daemon: &Arc<Daemon>, id: &str) -> Result<(), Error> {
    let pod = match daemon.registry.pod(id) {
        Ok(pod) => pod,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let _turn = pod.begin(VERB).await?;
    match pod.phase() {
        PodPhase::Stopped => Ok(()),
        // Whoever had the turn before us removed it.
        PodPhase::Removing if daemon.registry.pod(pod.id().as_str()).is_err() => Ok(()),
        // It never got READY, or its removal was interrupted: nobody has proven that nothing of it runs.
        PodPhase::Removing => halt(daemon, &pod).await,
        _ => stop_held(daemon, &pod).await,
    }
}

/// The same for whoever has the turn already.
pub async fn stop_held(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    pod.transition(&daemon.records, |state| {
        let first = state.phase != PodPhase::Stopping;
        state.phase = PodPhase::Stopping;
        first
    })
    .await?;
    fail::point("stop_pod_sandbox.after_intent").await?;
    halt(daemon, pod).await?;
    pod.transition(&daemon.records, |state| {
        state.phase = PodPhase::Stopped;
        state.init_pid = None;
        true
    })
    .await?;
    events::of_pod(daemon, pod, What::Stopped);
    fail::point("stop_pod_sandbox.after_record").await?;
    Ok(())
}

/// Ends every process, gives back the network, namespaces and cgroup, and lets the shim go.
pub async fn halt(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    // Nobody creates or starts anything in this pod from here on.
    let _closed = match pod.try_close_gate() {
        Some(closed) => closed,
        None => {
            // Somebody is at it, perhaps held up by a dead mount of the host's: what runs ends in the meantime.
            if let Some(shim) = pod.shim() {
                let _ = shim.stop_pod().await;
            }
            pod.close_gate().await?
        }
    };
    let shim = end_processes(daemon, pod).await?;
    fail::point("stop_pod_sandbox.after_kill").await?;
    // The network's plugins and the containers' mounts and cgroups need nothing of each other.
    let (proven, settled) = tokio::join!(network::detach(daemon, pod), exit::settle_all(daemon, pod));
    let proven = proven?;
    settled?;
    fail::point("stop_pod_sandbox.after_cni_del").await?;
    match shim {
        Some(shim) => let_go(daemon, pod, &shim, proven).await,
        None => clean_up(daemon, pod, proven).await,
    }
}

/// Kills everything in the pod and notes how each container ended. `None`: the shim is not there (any more).
async fn end_processes(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<Option<Shim>, Error> {
    if let Some(shim) = pod.shim() {
        match shim.stop_pod().await {
            Ok(()) => {
                if daemon.registry.containers_of(pod.id()).iter().any(|c| c.live()) {
                    exit::collect(daemon, pod, &shim).await?;
                }
                return Ok(Some(shim));
            }
            Err(ShimError::Gone) => {}
            Err(source) => {
                return Err(Error::Shim {
                    act: "end the processes",
                    id: pod.id().to_string(),
                    source,
                });
            }
        }
    }
    watch::bury(daemon, pod, "the pod's shim was gone when the pod was stopped").await?;
    Ok(None)
}

/// A living shim unpins, forgets its containers and ends.
async fn let_go(daemon: &Arc<Daemon>, pod: &Arc<Pod>, shim: &Shim, proven: bool) -> Result<(), Error> {
    // The containers' cgroups lie in the pod's: they have gone first.
    forget_unreadable(daemon, shim).await?;
    if proven {
        shim.release_pod()
            .await
            .map_err(Error::shim("release the namespaces", pod.id()))?;
    }
    fail::point("stop_pod_sandbox.after_release").await?;
    shim.shutdown()
        .await
        .map_err(Error::shim("end the shim", pod.id()))?;
    if tokio::time::timeout(GONE, shim.closed()).await.is_err() {
        return Err(Error::Timeout {
            kind: "the shim of pod",
            id: pod.id().to_string(),
            what: "end",
            timeout: GONE,
        });
    }
    pod.set_shim(None);
    fail::point("stop_pod_sandbox.after_shutdown").await?;
    Ok(())
}

/// A container whose record cannot be read has died with its pod; its shim forgets it, its files and records stay.
async fn forget_unreadable(daemon: &Arc<Daemon>, shim: &Shim) -> Result<(), Error> {
    let unreadable = daemon.registry.unreadable();
    for (id, _) in unreadable.iter() {
        match shim.delete(id).await {
            Ok(_) => tracing::warn!(container = id, "it ended with its pod; what is left of it stays"),
            Err(error) if error.is_not_found() || matches!(error, ShimError::Gone) => {}
            Err(source) => {
                return Err(Error::Shim {
                    act: "delete the task",
                    id: id.to_owned(),
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Without a shim its clean-up program does the rest.
async fn clean_up(daemon: &Arc<Daemon>, pod: &Arc<Pod>, proven: bool) -> Result<(), Error> {
    let dir = PodDir::new(&daemon.paths.pods, pod.id());
    if dir.path().exists() {
        daemon
            .launcher
            .cleanup(dir.path(), proven)
            .await
            .map_err(Error::shim("clean up after the shim", pod.id()))?;
    }
    Ok(())
}
