//! RemovePodSandbox, and the undoing of a RunPodSandbox that failed or was interrupted: the same steps.

use std::sync::Arc;

use super::dir::PodDir;
use super::{Pod, stop};
use crate::container::remove as containers;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::records::PodPhase;

const VERB: &str = "RemovePodSandbox";

/// Removes a pod with everything in it, running or not. One that is gone is fine.
pub async fn remove(daemon: &Arc<Daemon>, id: &str) -> Result<(), Error> {
    let pod = match daemon.registry.pod(id) {
        Ok(pod) => pod,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let _turn = pod.begin(VERB).await?;
    if daemon.registry.pod(pod.id().as_str()).is_err() {
        // Whoever had the turn before us removed it.
        return Ok(());
    }
    remove_held(daemon, &pod).await
}

/// The same for whoever has the turn already.
pub async fn remove_held(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    if !matches!(pod.phase(), PodPhase::Stopped | PodPhase::Removing) {
        stop::stop_held(daemon, pod).await?;
    }
    let halted = pod.phase() == PodPhase::Stopped;
    pod.note_removing(&daemon.records).await?;
    fail::point("remove_pod_sandbox.after_intent").await?;
    tear_down(daemon, pod, halted).await?;
    events::of_pod(daemon, pod, What::Deleted);
    Ok(())
}

/// Undoes a RunPodSandbox that failed. What cannot be undone now stays recorded and is tried again by the janitor.
pub async fn undo(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    let undone = async {
        pod.note_removing(&daemon.records).await?;
        tear_down(daemon, pod, false).await
    };
    if let Err(error) = undone.await {
        tracing::error!(pod = %pod.id(), error = error.chain(), "a pod that failed could not be undone; trying again later");
        daemon.janitor.wake();
    }
}

/// Takes down whatever there is of a pod in phase Removing, and forgets it.
pub async fn tear_down(daemon: &Arc<Daemon>, pod: &Arc<Pod>, halted: bool) -> Result<(), Error> {
    if !halted {
        stop::halt(daemon, pod).await?;
    }
    for container in daemon.registry.containers_of(pod.id()) {
        let _turn = container.begin(VERB).await?;
        containers::remove_held(daemon, &container).await?;
    }
    fail::point("remove_pod_sandbox.after_containers").await?;
    // A network that is not proven released keeps its namespace, which is pinned in there.
    if !daemon.releases.contains(pod.id()) {
        let dir = PodDir::new(&daemon.paths.pods, pod.id());
        crate::blocking::run(move || dir.remove()).await?;
    }
    fail::point("remove_pod_sandbox.after_files").await?;
    pod.forget(&daemon.records).await?;
    daemon.registry.remove_pod(pod.id());
    fail::point("remove_pod_sandbox.after_record").await?;
    Ok(())
}
