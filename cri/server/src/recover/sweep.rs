//! What lies under our own roots and no record knows: shims, namespaces, mounts, bundles, volumes, snapshots. It looks
//! nowhere else, and leaves alone what belongs to a record that cannot be read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::container::bundle::Bundle;
use crate::container::volumes;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::ids::{ContainerId, PodId};
use crate::pod::dir::PodDir;

/// Removes whatever nobody knows.
pub async fn sweep(daemon: &Arc<Daemon>) -> Result<(), Error> {
    let unreadable = daemon.registry.unreadable();
    for path in entries(&daemon.paths.pods)? {
        let Some(id) = name(&path).and_then(PodId::parse) else {
            continue;
        };
        let known = daemon.registry.pod(id.as_str()).is_ok();
        if !known && !daemon.releases.contains(&id) && !unreadable.contains(id.as_str()) {
            tracing::warn!(pod = %id, "no record knows this pod; removing what is left of it");
            tell(shim_directory(daemon, path).await);
        }
    }
    let ours =
        |id: &ContainerId| daemon.registry.container(id.as_str()).is_ok() || unreadable.contains(id.as_str());
    for path in entries(&daemon.paths.containers)? {
        let Some(id) = name(&path).and_then(ContainerId::parse) else {
            continue;
        };
        if !ours(&id) {
            tracing::warn!(container = %id, "no record knows this bundle; removing it");
            tell(crate::blocking::run(move || Bundle::at(path).remove()).await);
        }
    }
    for path in entries(&daemon.paths.volumes)? {
        let Some(id) = name(&path).and_then(ContainerId::parse) else {
            continue;
        };
        if !ours(&id) {
            let dir = daemon.paths.volumes.clone();
            tell(crate::blocking::run(move || volumes::remove(&dir, &id)).await);
        }
    }
    let daemon = daemon.clone();
    crate::blocking::run(move || {
        let store = &daemon.store;
        // Listed before anybody is asked: a container has its record before it has a snapshot.
        for active in store.actives().map_err(Error::store("list the snapshots"))? {
            // A lease named as a container is held by that container's record.
            let stray = ContainerId::parse(&active.lease).is_some()
                && daemon.registry.container(&active.lease).is_err()
                && !unreadable.contains(&active.lease);
            if stray {
                tracing::warn!(
                    snapshot = active.key,
                    "no record knows this snapshot; removing it"
                );
                store
                    .remove_active(&active.key)
                    .map_err(Error::store("remove a snapshot"))?;
                store
                    .release_lease(&active.lease)
                    .map_err(Error::store("release a lease"))?;
            }
        }
        Ok(())
    })
    .await
}

/// Kills what runs under the shim of a directory, living or dead, and keeps the network namespace for CNI DEL.
pub async fn stop_processes(daemon: &Arc<Daemon>, path: &Path) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    if let Ok(shim) = daemon.launcher.connect(path).await
        && shim.stop_pod().await.is_ok()
    {
        return Ok(());
    }
    let shown = path.display().to_string();
    let done = daemon.launcher.cleanup(path, false).await;
    done.map(drop).map_err(Error::shim("clean up", &shown))
}

/// The directory of a shim, perhaps a living one, with everything it made.
pub async fn shim_directory(daemon: &Arc<Daemon>, path: PathBuf) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    let shown = path.display().to_string();
    if let Ok(shim) = daemon.launcher.connect(&path).await {
        // What it does not do, the clean-up does.
        let _ = shim.stop_pod().await;
        for container in shim.info().await.map(|info| info.containers).unwrap_or_default() {
            let _ = shim.delete(&container.id).await;
        }
        let _ = shim.release_pod().await;
        let _ = shim.shutdown().await;
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), shim.closed()).await;
    }
    daemon
        .launcher
        .cleanup(&path, true)
        .await
        .map_err(Error::shim("clean up", &shown))?;
    crate::blocking::run(move || PodDir::at(path).remove()).await
}

fn tell(done: Result<(), Error>) {
    if let Err(error) = done {
        tracing::error!(error = error.chain(), "something left over could not be removed");
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    read.map(|entry| entry.map(|e| e.path()).map_err(Error::io("list", dir)))
        .collect()
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}
