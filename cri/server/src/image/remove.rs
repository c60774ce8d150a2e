//! RemoveImage: one name removes all of them. What containers still use stays on the disk until they are gone.

use std::sync::Arc;

use crate::daemon::Daemon;
use crate::error::Error;

/// Removes an image by any of its names or its id. One that is not here is fine.
///
/// Whoever removes images wants space: the build cache, which may hold the same layers, is kept to its limits too.
pub async fn remove(daemon: &Arc<Daemon>, name: &str) -> Result<(), Error> {
    let (store, name) = (daemon.store.clone(), name.to_owned());
    let limits = daemon.config.images.upkeep();
    crate::blocking::run(move || {
        let Some(image) = store.find(&name).map_err(Error::store("look an image up"))? else {
            return Ok(());
        };
        let removed = store
            .remove_image(&image.id)
            .map_err(Error::store("remove an image"))?;
        // The image is gone, whatever becomes of the cache.
        let tidied = store.tidy_cache(&limits).unwrap_or_else(|error| {
            tracing::warn!(%error, "the build cache cannot be tidied");
            0
        });
        let freed = removed.freed + tidied;
        tracing::info!(image = %image.id, names = removed.names.join(", "), freed, "image removed");
        Ok(())
    })
    .await
}
