//! Devices that are no more: what had been handed out goes with the layout of a GPU's MIG devices, or with the GPU, whoever has
//! it. Tells the
//! log and, in an Event, the pod that has it; nothing is done to the pod, which may be able to go on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use slipway_gpu::Gpu;
use tokio::sync::mpsc;

use crate::kube::Note;
use crate::pods::Pods;

/// Devices that wait to be told.
pub const MAX_WAITING: usize = 256;

/// A device that is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// Its UUID.
    pub uuid: String,
    /// What it was, for people.
    pub was: String,
    /// Why it is no more, for people.
    pub why: &'static str,
}

/// Everything that these GPUs can be handed out as, by UUID: its GPU, and what it is for people.
fn devices(gpus: &[Gpu]) -> BTreeMap<&str, (&Gpu, String)> {
    let mut all = BTreeMap::new();
    for gpu in gpus {
        let name = format!("GPU {} ({})", gpu.index, gpu.uuid);
        if gpu.mig != Some(true) {
            all.insert(gpu.uuid.as_str(), (gpu, name));
            continue;
        }
        for slice in &gpu.mig_devices {
            let was = format!("MIG device {} ({}) of {name}", slice.profile, slice.uuid);
            all.insert(slice.uuid.as_str(), (gpu, was));
        }
    }
    all
}

/// The devices of `before` that are not there now.
pub fn gone(before: &[Gpu], now: &[Gpu]) -> Vec<Gone> {
    let there = devices(now);
    devices(before)
        .into_iter()
        .filter(|(uuid, _)| !there.contains_key(uuid))
        .map(|(uuid, (gpu, was))| Gone {
            uuid: uuid.to_owned(),
            was,
            why: match now.iter().any(|g| g.uuid == gpu.uuid) {
                true => "the GPU was divided otherwise",
                false => "the GPU is not in the machine any more",
            },
        })
        .collect()
}

/// Tells of each who has it.
pub async fn tell(pods: Arc<Pods>, mut gone: mpsc::Receiver<Gone>, to: mpsc::Sender<Note>) {
    while let Some(Gone { uuid, was, why }) = gone.recv().await {
        let at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let snapshot = match pods.soon().await {
            Ok(snapshot) => snapshot,
            Err(e) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(
                    device = uuid,
                    error,
                    "{was} is gone; kubelet does not say who has it"
                );
                continue;
            }
        };
        let holders = snapshot.holders(&uuid);
        if holders.is_empty() {
            tracing::info!(device = uuid, "{was} is gone; nobody has it");
        }
        for (_, h) in holders {
            tracing::warn!(
                device = uuid,
                namespace = h.namespace,
                pod = h.pod,
                container = h.container,
                "{was} is gone, and a container has it"
            );
            // Nobody listens: there is no API server to tell.
            let _ = to.try_send(Note {
                about: Some(h.clone()),
                reason: "GpuGone",
                message: format!(
                    "{was}, which this container has, is no more: {why}. The container is left alone, but not started on it again; delete the pod to have another"
                ),
                warning: true,
                at,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::MigDevice;

    fn gpu(index: u32, slices: Option<&[&str]>) -> Gpu {
        let slice = |name: &&str| MigDevice {
            uuid: (*name).to_owned(),
            profile: "1g.5gb".into(),
            ..MigDevice::default()
        };
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            mig: Some(slices.is_some()),
            mig_devices: slices.unwrap_or_default().iter().map(slice).collect(),
            ..Gpu::default()
        }
    }

    #[test]
    fn a_gpu_that_is_divided_is_gone_and_one_that_is_divided_otherwise_is_not() {
        let before = [gpu(0, None), gpu(1, Some(&["a", "b"])), gpu(2, None)];
        let after = [gpu(0, Some(&["c"])), gpu(1, Some(&["b", "d"])), gpu(2, None)];
        let uuids: Vec<String> = gone(&before, &after).into_iter().map(|g| g.uuid).collect();
        assert_eq!(uuids, ["GPU-0", "a"]);
        assert!(gone(&after, &after).is_empty());
        let whole = gone(&after, &before);
        assert!(whole[0].was.contains("1g.5gb (c) of GPU 0"), "{whole:?}");
        assert!(whole.iter().all(|g| g.why.contains("divided")), "{whole:?}");
        let taken = gone(&before, &before[..1]);
        assert_eq!(taken.len(), 3);
        assert!(
            taken.iter().all(|g| g.why.contains("not in the machine")),
            "{taken:?}"
        );
    }
}
