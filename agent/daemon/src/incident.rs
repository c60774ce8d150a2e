//! What an XID was about: the process that was at it, its container and pod, and whoever else has the GPU. Told in the log and
//! to Kubernetes; found out after kubelet has heard that the GPU is sick, and beside everything else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use slipway_gpu::Gpu;
use tokio::sync::{Semaphore, mpsc};

use crate::http::{Seen, devices};
use crate::kmsg::Log;
use crate::pods::{Holder, Pods};

/// XIDs that wait to be told; a storm's others are in the log and the counters only.
pub const MAX_WAITING: usize = 64;
/// How many are looked into at a time.
const MAX_AT_ONCE: usize = 8;
/// How long the kernel's log may take to say what NVML said.
const PATIENCE: Duration = Duration::from_millis(200);

/// An XID.
#[derive(Debug, Clone)]
pub struct Xid {
    /// The GPU.
    pub gpu: Gpu,
    /// Its number.
    pub xid: u64,
    /// GPU and compute instance, when it is of one.
    pub instance: Option<(u32, u32)>,
    /// Why the GPU may not be handed out any more; none: it may.
    pub condemned: Option<String>,
}

/// An XID and whom it concerns.
#[derive(Debug, Clone)]
pub struct Incident {
    /// The XID.
    pub xid: Xid,
    /// The process that was at it, when the driver tells.
    pub process: Option<(u32, Option<String>)>,
    /// The container of that process.
    pub culprit: Option<Holder>,
    /// The containers that have the GPU, or the instance of it: all that are hit when it is condemned.
    pub holders: Vec<Holder>,
}

/// Who finds out.
pub struct Inquiry {
    pub log: Log,
    pub pods: Arc<Pods>,
    pub seen: Seen,
    /// /proc.
    pub proc: PathBuf,
}

/// Finds out about each XID and sends it on.
pub async fn inquire(inquiry: Inquiry, mut xids: mpsc::Receiver<Xid>, to: mpsc::Sender<Incident>) {
    let inquiry = Arc::new(inquiry);
    let room = Arc::new(Semaphore::new(MAX_AT_ONCE));
    while let Some(xid) = xids.recv().await {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let (inquiry, to) = (Arc::clone(&inquiry), to.clone());
        tokio::spawn(async move {
            let incident = inquiry.about(xid).await;
            tell(&incident);
            // Nobody listens: there is no API server to tell.
            let _ = to.try_send(incident);
            drop(permit);
        });
    }
}

impl Inquiry {
    async fn about(&self, xid: Xid) -> Incident {
        let (line, snapshot) = tokio::join!(self.log.of(&xid.gpu.pci, xid.xid, PATIENCE), self.pods.now());
        let devices = devices(&xid.gpu, xid.instance.filter(|_| xid.condemned.is_none()));
        let process = line.and_then(|l| Some((l.pid?, l.name)));
        let mut holders: Vec<Holder> = Vec::new();
        let mut culprit = None;
        if let Ok(snapshot) = &snapshot {
            let all = devices.iter().flat_map(|d| snapshot.holders(d));
            holders = all.map(|(_, holder)| holder.clone()).collect();
            holders.sort();
            holders.dedup();
            if let Some((pid, _)) = &process {
                culprit = snapshot.of_process(&self.proc, *pid, &devices);
            }
        }
        if let (None, Some((pid, _))) = (&culprit, &process) {
            // It is gone by now.
            culprit = self.seen.holder(*pid);
        }
        Incident {
            xid,
            process,
            culprit,
            holders,
        }
    }
}

fn tell(incident: &Incident) {
    let xid = &incident.xid;
    let (gpu, number) = (xid.gpu.uuid.as_str(), xid.xid);
    let condemned = xid.condemned.as_deref();
    let pid = incident.process.as_ref().map(|(pid, _)| *pid);
    let name = incident.process.as_ref().and_then(|(_, name)| name.as_deref());
    if let Some(h) = &incident.culprit {
        tracing::warn!(
            gpu,
            xid = number,
            pid,
            process = name,
            namespace = h.namespace,
            pod = h.pod,
            container = h.container,
            uid = h.uid,
            condemned,
            "XID of a container's process"
        );
    } else if pid.is_some() {
        tracing::warn!(
            gpu,
            xid = number,
            pid,
            process = name,
            condemned,
            "XID of a process in no pod"
        );
    }
    for h in incident
        .holders
        .iter()
        .filter(|h| Some(*h) != incident.culprit.as_ref())
    {
        tracing::warn!(
            gpu,
            xid = number,
            namespace = h.namespace,
            pod = h.pod,
            container = h.container,
            condemned,
            "XID of a GPU that a container has"
        );
    }
}
