//! What is asked of the network's plugins beside a pod's coming and going: whether they can work (STATUS), whether the pods'
//! networks are as they were left (CHECK), and that they forget what nobody has (GC, where configured; what a reboot ended, always).

use std::sync::Arc;
use std::time::Duration;

use super::{Pod, addresses};
use crate::daemon::Daemon;
use crate::records::PodNetworkState;
use slipway_network::{Attachment, CniError, NetworkStatus, chain};

/// Between two questions whether the plugins can work.
const PAUSE: Duration = Duration::from_secs(15);

/// Looks after the network until slipwayd ends.
pub async fn run(daemon: Arc<Daemon>) {
    let once = async {
        // First: it is done alone, and checking all pods takes long.
        settle(&daemon).await;
        check(&daemon).await;
    };
    tokio::join!(once, keep(&daemon));
}

async fn settle(daemon: &Daemon) {
    if daemon.config.network.gc
        && let Err(error) = collect(daemon).await
    {
        tracing::warn!(
            error = chain(&error),
            "the network's plugins could not be told which addresses are still used"
        );
    }
}

async fn keep(daemon: &Arc<Daemon>) {
    let mut complained = false;
    let (mut forgotten, mut told) = (None, false);
    loop {
        let network = daemon.cni.network();
        if let Some(name) = &network
            && network != forgotten
        {
            match addresses::forget(daemon, name).await {
                Ok(()) => forgotten = network,
                Err(error) if !told => {
                    tracing::warn!(error = error.chain(), "trying again");
                    told = true;
                }
                Err(_) => {}
            }
        }
        match daemon.cni.probe().await {
            NetworkStatus::NotReady { reason } if !complained => {
                tracing::warn!(reason, "the network is not ready");
                complained = true;
            }
            NetworkStatus::NotReady { .. } => {}
            NetworkStatus::Ready { .. } => complained = false,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Says which pods' networks are not as they were left: somebody may have been at them while slipwayd was away.
async fn check(daemon: &Daemon) {
    for pod in daemon.registry.pods() {
        if let Some(attached) = attachment(&pod)
            && let Err(error) = daemon.cni.check(&attached).await
            // It may have been taken down meanwhile.
            && attachment(&pod).is_some()
        {
            tracing::warn!(pod = %pod.id(), error = chain(&error), "the pod's network is not as it was left");
        }
    }
}

/// Tells the plugins of the configured network which attachments there are.
async fn collect(daemon: &Daemon) -> Result<(), CniError> {
    let NetworkStatus::Ready { network } = daemon.cni.status() else {
        return Ok(());
    };
    if daemon.registry.unreadable().iter().next().is_some() {
        tracing::warn!("addresses are not collected: there are pods whose records cannot be read");
        return Ok(());
    }
    let valid = || {
        let pods = daemon.registry.pods();
        let releases = daemon.releases.all();
        let released = releases.iter().map(|release| release.attachment.clone());
        pods.iter()
            .filter_map(|pod| attachment(pod))
            .chain(released)
            .collect()
    };
    daemon.cni.gc(&network, valid).await
}

fn attachment(pod: &Pod) -> Option<Attachment> {
    match pod.state().network.clone() {
        PodNetworkState::Planned(attachment) | PodNetworkState::Attached(attachment) => Some(*attachment),
        PodNetworkState::Host | PodNetworkState::Released => None,
    }
}
