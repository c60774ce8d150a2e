//! What builds that died left on this node: their shims, networks, mounts and directories, then their rows in the store.
//!
//! A build writes down what it has outside the store before it makes it, in the words read here, and whoever opens the
//! store undoes it when the build's owner lock is free. A build that is alive is never touched.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use slipway_image::DeadOwner;
use slipway_network::Attachment;

use crate::daemon::Daemon;
use crate::error::Error;

/// What a build has outside the store. Only `kind: build` of version 1 is understood; others are left to who does.
#[derive(Debug, Deserialize)]
struct Estate {
    version: u32,
    kind: String,
    state_dir: PathBuf,
    #[serde(default)]
    attachments: Vec<Attachment>,
}

/// Undoes what dead builds left; how many could not be undone.
pub async fn bury(daemon: &Arc<Daemon>) -> Result<usize, Error> {
    let store = daemon.store.clone();
    let dead = crate::blocking::run(move || store.dead_owners().map_err(Error::store("ask for dead builds")))
        .await?;
    let mut left = 0;
    for owner in dead {
        let Ok(estate) = serde_json::from_str::<Estate>(&owner.estate) else {
            tracing::warn!(
                owner = owner.id,
                "a dead owner's words are not known here; left alone"
            );
            continue;
        };
        if estate.kind != "build" || estate.version != 1 {
            continue;
        }
        tracing::info!(owner = owner.id, dir = %estate.state_dir.display(), "undoing what a dead build left");
        if let Err(error) = undo(daemon, owner, estate).await {
            left += 1;
            tracing::warn!(
                error = error.chain(),
                "what a dead build left could not be undone"
            );
        }
    }
    Ok(left)
}

/// First what runs, then its addresses (an address must not be given to another while somebody uses it), then the rest.
async fn undo(daemon: &Arc<Daemon>, owner: DeadOwner, estate: Estate) -> Result<(), Error> {
    super::sweep::stop_processes(daemon, &estate.state_dir).await?;
    let mut failed = None;
    for attachment in &estate.attachments {
        if let Err(source) = daemon.cni.del(attachment).await {
            failed.get_or_insert(Error::Network {
                act: "detach the network",
                id: owner.id.clone(),
                source: Box::new(source),
            });
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    super::sweep::shim_directory(daemon, estate.state_dir).await?;
    crate::blocking::run(move || owner.bury().map_err(Error::store("bury a dead build"))).await
}
