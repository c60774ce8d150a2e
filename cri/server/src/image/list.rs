//! ListImages and ImageStatus.

use std::sync::Arc;

use slipway_image::Image;

use crate::daemon::Daemon;
use crate::error::Error;

/// The images a filter means: all, or the one it names. Torn ones are not there: they have to be pulled again.
pub async fn list(daemon: &Arc<Daemon>, name: &str) -> Result<Vec<Image>, Error> {
    if !name.is_empty() {
        return Ok(find(daemon, name).await?.into_iter().collect());
    }
    let store = daemon.store.clone();
    let mut images =
        crate::blocking::run(move || store.images().map_err(Error::store("list the images"))).await?;
    images.retain(|image| image.intact);
    Ok(images)
}

/// The image with this name or id, if it is here. A name that is no reference names no image.
pub async fn find(daemon: &Arc<Daemon>, name: &str) -> Result<Option<Image>, Error> {
    let (store, name) = (daemon.store.clone(), name.to_owned());
    crate::blocking::run(move || store.resolve(&name).map_err(Error::store("look an image up"))).await
}

/// What crictl inspecti shows beyond the status.
pub fn verbose(image: &Image) -> serde_json::Value {
    serde_json::json!({
        "imageSpec": image.config,
        "chainID": image.chain.as_ref().map(ToString::to_string),
        "diffIDs": image.layers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "manifest": image.manifest.as_ref().map(ToString::to_string),
        "builtHere": image.built_here,
        "pinned": image.pinned,
    })
}
