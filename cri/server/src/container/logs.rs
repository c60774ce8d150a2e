//! ReopenContainerLog: after the log file was renamed, the shim writes to its path anew.

use std::sync::Arc;

use crate::daemon::Daemon;
use crate::error::Error;
use crate::records::ContainerPhase;

const VERB: &str = "reopen its log";

/// Reopens the log of a running container. On an error no file is made.
pub async fn reopen(daemon: &Arc<Daemon>, id: &str) -> Result<(), Error> {
    let container = daemon.registry.container(id)?;
    if !matches!(container.phase(), ContainerPhase::Running { .. }) {
        return Err(container.wrong_state(VERB));
    }
    let shim = daemon.registry.pod(container.pod().as_str())?.live_shim(VERB)?;
    shim.reopen_log(container.id().as_str())
        .await
        .map_err(Error::shim("reopen the log", container.id()))
}
