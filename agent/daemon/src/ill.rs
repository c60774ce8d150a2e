//! GPUs that have fallen ill without an XID, by a sign or by not answering: whoever has one is told, in the log and in an Event.
//! An XID's own are told with its process ([`crate::incident`]).

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use slipway_gpu::Gpu;
use tokio::sync::mpsc;

use crate::http::devices;
use crate::kube::Note;
use crate::pods::Pods;

/// GPUs that wait to be told.
pub const MAX_WAITING: usize = 64;

/// A GPU that has fallen ill.
#[derive(Debug, Clone)]
pub struct Ill {
    /// The GPU.
    pub gpu: Gpu,
    /// Why it is not handed out any more.
    pub reason: String,
}

/// Tells each who has it, or a slice of it.
pub async fn tell(pods: Arc<Pods>, mut ill: mpsc::Receiver<Ill>, to: mpsc::Sender<Note>) {
    while let Some(Ill { gpu, reason }) = ill.recv().await {
        let at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let snapshot = match pods.soon().await {
            Ok(snapshot) => snapshot,
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(
                    gpu = gpu.uuid,
                    error,
                    "kubelet does not say who has the unhealthy GPU"
                );
                continue;
            }
        };
        let mut holders: Vec<_> = devices(&gpu, None)
            .into_iter()
            .flat_map(|d| snapshot.holders(d))
            .map(|(_, holder)| holder)
            .collect();
        holders.sort();
        holders.dedup();
        for h in holders {
            tracing::warn!(
                gpu = gpu.uuid,
                namespace = h.namespace,
                pod = h.pod,
                container = h.container,
                reason,
                "a container has the unhealthy GPU"
            );
            // Nobody listens: there is no API server to tell.
            let _ = to.try_send(Note {
                about: Some(h.clone()),
                reason: "GpuUnhealthy",
                message: format!(
                    "GPU {} ({}), which this container has, is unhealthy: {reason}",
                    gpu.index, gpu.uuid
                ),
                warning: true,
                at,
            });
        }
    }
}
