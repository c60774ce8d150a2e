//! PullImage.

use std::sync::Arc;

use slipway_image::Image;

use crate::daemon::Daemon;
use crate::error::Error;

/// Pulls an image.
pub async fn pull(_daemon: &Arc<Daemon>, _name: &str, _auth: Option<()>) -> Result<Image, Error> {
    Err(Error::Unimplemented { what: "PullImage" })
}
