//! What could not be done or undone is tried again here, with patience: networks to be released, removals that failed,
//! shims to be buried. It sleeps until somebody leaves it work, and looks for dead builds now and then.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::daemon::Daemon;
use crate::pod::network;
use crate::records::{ContainerPhase, PodPhase};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Between two looks for builds that died while we run.
const BUILDS: Duration = Duration::from_secs(60);

/// Where others leave word that there is work.
#[derive(Default)]
pub struct Janitor {
    work: Notify,
}

impl Janitor {
    /// There is something to be tried again.
    pub fn wake(&self) {
        self.work.notify_one();
    }
}

/// Works until slipwayd ends.
pub async fn run(daemon: Arc<Daemon>) {
    loop {
        tokio::select! {
            () = daemon.janitor.work.notified() => {}
            () = tokio::time::sleep(BUILDS) => {
                if let Err(error) = super::builds::bury(&daemon).await {
                    tracing::warn!(error = error.chain(), "dead builds could not be looked for");
                }
                continue;
            }
        }
        let mut pause = FIRST_PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            if round(&daemon).await == 0 {
                break;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Tries everything once; how much is left.
async fn round(daemon: &Arc<Daemon>) -> usize {
    let mut left = network::retry_releases(daemon).await;
    for pod in daemon.registry.pods() {
        let unfinished = match pod.phase() {
            PodPhase::Removing => true,
            PodPhase::Ready | PodPhase::Starting | PodPhase::Stopping => pod.shim().is_none(),
            _ => false,
        };
        // Somebody at work on it will see to it.
        if !unfinished || pod.try_begin("a look at it").is_err() {
            continue;
        }
        if let Err(error) = super::recover_pod(daemon, &pod).await {
            tracing::warn!(pod = %pod.id(), error = error.chain(), "still not done");
            left += 1;
        }
    }
    for container in daemon.registry.containers() {
        if !matches!(container.phase(), ContainerPhase::Removing(_)) {
            continue;
        }
        let Ok(_turn) = container.try_begin("finishing its removal") else {
            continue;
        };
        if let Err(error) = crate::container::remove::remove_held(daemon, &container).await {
            tracing::warn!(container = %container.id(), error = error.chain(), "still not removed");
            left += 1;
        }
    }
    left
}
