//! PullImage: the puller does it, and answers with a build of this node's own where design says so.

use std::sync::Arc;

use slipway_image::{Credentials, Image, Platform, Progress, ProgressEvent, PullError, Reference};

use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;

/// Pulls an image by name.
pub async fn pull(daemon: &Arc<Daemon>, name: &str, auth: Option<Credentials>) -> Result<Image, Error> {
    let reference =
        Reference::parse(name).map_err(|error| Error::invalid("image", format!("{name:?}: {error}")))?;
    let _turn = daemon.pulls.acquire().await.map_err(|_| Error::ShuttingDown)?;
    fail::point("pull_image.before_pull").await?;
    let image = daemon
        .puller
        .pull(&reference, auth, &Platform::host(), &Told)
        .await
        .map_err(|source: PullError| Error::Pull {
            name: name.to_owned(),
            source: Box::new(source),
        })?;
    fail::point("pull_image.after_pull").await?;
    tracing::info!(image = %image.id, names = ?image.names.iter().map(ToString::to_string).collect::<Vec<_>>(), "pulled");
    Ok(image)
}

/// What a pull tells goes to the log; failpoints lie on the way.
struct Told;

impl Progress for Told {
    fn event(&self, event: ProgressEvent) {
        // An injected error has nowhere to go from here; dying and waiting work.
        match event {
            ProgressEvent::Resolved { digest, host } => tracing::debug!(%digest, host, "resolved"),
            ProgressEvent::Layers { layers } => {
                let missing = layers.iter().filter(|layer| !layer.present);
                tracing::debug!(
                    layers = layers.len(),
                    missing = missing.clone().count(),
                    bytes = missing.map(|layer| layer.size).sum::<u64>(),
                    "fetching"
                );
                let _ = fail::blocking_point("pull_image.after_manifest");
            }
            ProgressEvent::Committing => {
                let _ = fail::blocking_point("pull_image.before_commit");
            }
            ProgressEvent::Retrying { what, reason, pause } => {
                tracing::warn!(what, reason, ?pause, "a transfer broke; trying again");
            }
            ProgressEvent::AnsweredByBuild { reason } => {
                tracing::warn!(
                    reason,
                    "the registry cannot give the image; answering with the build of this node"
                );
            }
            _ => {}
        }
    }
}
