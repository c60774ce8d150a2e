//! RemoveImage: one name removes all of them. What containers still use stays on the disk until they are gone.

use std::sync::Arc;

use crate::daemon::Daemon;
use crate::error::Error;

/// Removes an image by any of its names or its id. One that is not here is fine.
pub async fn remove(daemon: &Arc<Daemon>, name: &str) -> Result<(), Error> {
    let (store, name) = (daemon.store.clone(), name.to_owned());
    crate::blocking::run(move || {
        let Some(image) = store.find(&name).map_err(Error::store("look an image up"))? else { return Ok(()) };
        let removed = store.remove_image(&image.id).map_err(Error::store("remove an image"))?;
        tracing::info!(image = %image.id, names = removed.names.join(", "), freed = removed.freed, "image removed");
        Ok(())
    })
    .await
}
