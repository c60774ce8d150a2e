//! ImageFsInfo: what images and containers take of the disk.

use std::sync::Arc;

use slipway_snapshot::FsInfo;

use crate::daemon::Daemon;
use crate::error::Error;

/// The filesystem under the store.
pub async fn fs_info(daemon: &Arc<Daemon>) -> Result<FsInfo, Error> {
    let store = daemon.store.clone();
    crate::blocking::run(move || store.fs_info().map_err(Error::store("measure the filesystem"))).await
}
