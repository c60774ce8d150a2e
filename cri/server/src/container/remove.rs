//! RemoveContainer, and the undoing of a CreateContainer that failed or was interrupted: the same steps.

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::Error as ShimError;

use super::{Container, stop, volumes};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::pod::Pod;
use crate::records::ContainerPhase;

const VERB: &str = "RemoveContainer";

/// Removes a container, running or not. One that is gone is fine.
pub async fn remove(daemon: &Arc<Daemon>, id: &str) -> Result<(), Error> {
    let container = match daemon.registry.container(id) {
        Ok(container) => container,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let _turn = stop::begin(daemon, &container, VERB).await?;
    if daemon.registry.container(container.id().as_str()).is_err() {
        return Ok(());
    }
    remove_held(daemon, &container).await
}

/// The same for whoever has the turn already.
pub async fn remove_held(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Result<(), Error> {
    if container.live() {
        stop::end(daemon, container, Duration::ZERO).await?;
    }
    container
        .transition(&daemon.records, |state| {
            let ended = match &state.phase {
                ContainerPhase::Removing(_) => return false,
                ContainerPhase::Exited(exited) => Some(exited.clone()),
                _ => None,
            };
            state.phase = ContainerPhase::Removing(ended);
            true
        })
        .await?;
    tear_down(daemon, container).await
}

/// Undoes a CreateContainer that failed. What cannot be undone now stays recorded and is tried again by the janitor.
pub async fn undo(daemon: &Arc<Daemon>, container: &Arc<Container>) {
    if let Err(error) = remove_held(daemon, container).await {
        tracing::error!(
            container = %container.id(),
            error = error.chain(),
            "a container that failed could not be undone; trying again later"
        );
        daemon.janitor.wake();
    }
}

/// Takes down whatever there is of a container that does not live, and forgets it.
pub async fn tear_down(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Result<(), Error> {
    if let Ok(pod) = daemon.registry.pod(container.pod().as_str()) {
        forget(&pod, container).await?;
    }
    let (bundle, volumes) = (daemon.bundle(container.id()), daemon.paths.volumes.clone());
    let (store, id) = (daemon.store.clone(), container.id().clone());
    tracing::debug!("the shim has forgotten it");
    crate::blocking::run(move || {
        bundle.remove()?;
        tracing::debug!("its bundle is gone");
        volumes::remove(&volumes, &id)?;
        tracing::debug!("its volumes are gone");
        store
            .remove_active(id.as_str())
            .map_err(Error::store("remove a container's snapshot"))?;
        tracing::debug!("its snapshot is gone");
        store
            .release_lease(id.as_str())
            .map_err(Error::store("release a container's lease"))
    })
    .await?;
    container.forget(&daemon.records).await?;
    daemon.registry.remove_container(container.id());
    if !container.hidden() {
        events::of_container(daemon, container, What::Deleted);
    }
    Ok(())
}

/// Has the shim end and forget it, whatever became of it there.
async fn forget(pod: &Pod, container: &Container) -> Result<(), Error> {
    const SIGKILL: u32 = 9;
    let Some(shim) = pod.shim() else { return Ok(()) };
    let id = container.id().as_str();
    let failed = |act| {
        move |source| Error::Shim {
            act,
            id: id.to_owned(),
            source,
        }
    };
    let gone = |error: &ShimError| error.is_not_found() || matches!(error, ShimError::Gone);
    match shim.delete(id).await {
        Ok(_) => return Ok(()),
        Err(error) if gone(&error) => return Ok(()),
        // It runs: a crash came between the start and its record.
        Err(_) => {}
    }
    match shim.kill(id, SIGKILL, true).await {
        Ok(()) => {}
        Err(error) if gone(&error) => {}
        Err(source) => return Err(failed("kill the processes")(source)),
    }
    match tokio::time::timeout(Duration::from_secs(10), shim.wait(id)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) if gone(&error) => return Ok(()),
        Ok(Err(source)) => return Err(failed("wait for the end")(source)),
        Err(_) => {
            return Err(Error::Timeout {
                kind: "container",
                id: id.to_owned(),
                what: "end after SIGKILL",
                timeout: Duration::from_secs(10),
            });
        }
    }
    match shim.delete(id).await {
        Ok(_) => Ok(()),
        Err(error) if gone(&error) => Ok(()),
        Err(source) => Err(failed("delete the task")(source)),
    }
}
