//! Collecting what a page of metrics says: each GPU is asked once, kubelet is asked who has what. Nothing is kept from one page
//! to the next but the page itself, for a moment: what is gone is in the next one no more.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex as Lock, PoisonError};
use std::time::Duration;

use slipway_gpu::{Gpu, GpuError, Process, Sample};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::metrics;
use crate::board::{Board, Posted};
use crate::pods::{Holder, Pods, Snapshot};
use crate::status::Status;

/// How long a page is good: however many ask, the GPUs are asked once.
const FRESH: Duration = Duration::from_secs(1);
/// How long all GPUs together may take; those that are not asked by then are left out.
const LIMIT: Duration = Duration::from_secs(8);
/// How long a GPU that did not answer is left out.
const SILENT: Duration = Duration::from_secs(60);

/// The containers of the processes that were last seen on GPUs: an XID may tell of one that is gone.
#[derive(Debug, Clone, Default)]
pub struct Seen(Arc<Lock<BTreeMap<u32, Holder>>>);

impl Seen {
    /// Whose a process was.
    pub fn holder(&self, pid: u32) -> Option<Holder> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&pid).cloned()
    }

    fn replace(&self, seen: BTreeMap<u32, Holder>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }
}

/// Everything that a page says.
pub struct Facts {
    pub posted: Arc<Posted>,
    /// By GPU.
    pub samples: BTreeMap<String, Sample>,
    /// None: kubelet does not answer, and nothing is said of pods.
    pub snapshot: Option<Arc<Snapshot>>,
    /// Whether NVML has been let go of.
    pub released: bool,
    /// By GPU, with the container of each.
    pub processes: Vec<(String, Process, Option<Holder>)>,
}

/// Who collects it.
pub struct Gather {
    pub board: Board,
    pub status: Arc<Status>,
    pub pods: Arc<Pods>,
    pub seen: Seen,
    /// /proc.
    pub proc: PathBuf,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    page: Option<(Instant, String)>,
    /// GPUs that did not answer, by UUID.
    silent: BTreeMap<String, Instant>,
}

impl Gather {
    /// From these.
    pub fn from(board: Board, status: Arc<Status>, pods: Arc<Pods>, seen: Seen, proc: PathBuf) -> Gather {
        Gather {
            board,
            status,
            pods,
            seen,
            proc,
            last: Mutex::default(),
        }
    }

    /// The page.
    pub async fn page(&self) -> String {
        let mut last = self.last.lock().await;
        if let Some((at, page)) = &last.page
            && at.elapsed() < FRESH
        {
            return page.clone();
        }
        let page = metrics::render(&self.facts(&mut last).await);
        last.page = Some((Instant::now(), page.clone()));
        page
    }

    async fn facts(&self, last: &mut Last) -> Facts {
        let posted = Arc::clone(&self.board.borrow());
        let snapshot = self.pods.now().await.ok();
        let until = Instant::now() + LIMIT;
        last.silent.retain(|_, at| at.elapsed() < SILENT);
        let mut samples = BTreeMap::new();
        if let Some(supervisor) = self.status.supervisor() {
            for gpu in &posted.inventory.gpus {
                let silent = posted.silent.contains(&gpu.uuid) || last.silent.contains_key(&gpu.uuid);
                if silent || Instant::now() > until {
                    continue;
                }
                match supervisor.sample(gpu.index, &gpu.uuid).await {
                    Ok(sample) => drop(samples.insert(gpu.uuid.clone(), sample)),
                    Err(GpuError::Hangs(_) | GpuError::StillHangs) => {
                        last.silent.insert(gpu.uuid.clone(), Instant::now());
                    }
                    Err(_) => {}
                }
            }
        }
        let mut processes = Vec::new();
        let mut seen = BTreeMap::new();
        for gpu in &posted.inventory.gpus {
            for process in samples.get(&gpu.uuid).iter().flat_map(|s| &s.processes) {
                let holder = snapshot
                    .as_ref()
                    .and_then(|s| s.of_process(&self.proc, process.pid, &devices(gpu, process.instance)));
                if let Some(holder) = &holder {
                    seen.insert(process.pid, holder.clone());
                }
                processes.push((gpu.uuid.clone(), *process, holder));
            }
        }
        self.seen.replace(seen);
        Facts {
            posted,
            released: self.status.released(),
            samples,
            snapshot,
            processes,
        }
    }
}

/// The devices that a process on this GPU, or this instance of it, may have: its own only where it is known.
pub fn devices(gpu: &Gpu, instance: Option<(u32, u32)>) -> Vec<&str> {
    match instance {
        Some(there) => gpu
            .mig_devices
            .iter()
            .filter(|m| (m.gi, m.ci) == there)
            .map(|m| m.uuid.as_str())
            .collect(),
        None => std::iter::once(gpu.uuid.as_str())
            .chain(gpu.mig_devices.iter().map(|m| m.uuid.as_str()))
            .collect(),
    }
}
