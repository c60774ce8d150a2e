//! The layers of a stage while they are made: what lies below the next step, and the sealing (hash, sync,
//! commit, cache) that goes on behind it. Knows nothing of instructions.
//!
//! A step's snapshot is usable for the next step the moment nobody writes to it any more. Its DiffID, and with it
//! its place in the catalog, comes later:
//! ```text
//!  step n done ──▶ Tip (active snapshot) ──▶ step n+1 mounts it as its lower
//!        └──▶ Sealer: hash its tar ─▶ one syncfs for all that wait ─▶ commit ─▶ cache entry ─▶ Sealed
//! ```

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use slipway_image::{Active, CacheLock, ChainId, Digest, LayerOptions, Lease, Store, StoreError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::cancel::Cancel;

/// A root file system in the making: the newest layer with everything below it.
#[derive(Clone, Debug)]
pub struct Tip {
    node: Arc<Node>,
}

#[derive(Debug)]
enum Node {
    /// No layer at all.
    Scratch,
    /// A layer in the store.
    Committed(ChainId),
    /// A snapshot that is being sealed.
    Sealing {
        active: Active,
        sealed: watch::Receiver<Option<Outcome>>,
    },
}

type Outcome = Result<ChainId, Arc<SealError>>;

/// A layer could not be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The store said no.
    #[error("cannot make a layer of a step's files")]
    Store(#[source] StoreError),
    /// The layer below failed.
    #[error("the layer below could not be made")]
    Below(#[source] Arc<SealError>),
    /// The build was cancelled before it was done.
    #[error("cancelled")]
    Cancelled,
    /// The process is ending.
    #[error("the background work has stopped")]
    Stopped,
}

impl SealError {
    /// Whether it is only the echo of an interrupt.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        match self {
            SealError::Cancelled => true,
            SealError::Below(below) => below.is_cancelled(),
            SealError::Store(_) | SealError::Stopped => false,
        }
    }
}

/// A snapshot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What it was to lie on will never be a layer.
    #[error("the layer below could not be made")]
    Below(#[source] Arc<SealError>),
}

/// What a cache entry says besides its layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CacheValue {
    /// When the layer was made, in nanoseconds since 1970: history keeps it on later hits.
    pub created_ns: i64,
    /// The step's own key, by which the next step's is made; the entry may stand under another one.
    pub key: Digest,
}

impl CacheValue {
    /// The time as such.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
            + std::time::Duration::from_nanos(u64::try_from(self.created_ns).unwrap_or_default())
    }
}

impl Tip {
    /// Nothing.
    #[must_use]
    pub fn scratch() -> Tip {
        Tip {
            node: Arc::new(Node::Scratch),
        }
    }

    /// A chain that is in the store, held by the build's lease.
    #[must_use]
    pub fn committed(chain: ChainId) -> Tip {
        Tip {
            node: Arc::new(Node::Committed(chain)),
        }
    }

    /// A writable snapshot on top. Blocks, on a thread of the runtime's that may.
    ///
    /// # Errors
    /// What the store says; [`PrepareError::Below`] when it is known that this will never be a layer, or when `cancel` is
    /// set while that is not known.
    pub fn prepare(
        &self,
        store: &Store,
        key: &str,
        lease: &Lease,
        cancel: &Cancel,
    ) -> Result<Active, PrepareError> {
        let prepared = match &*self.node {
            Node::Scratch => store.prepare(key, None, lease),
            Node::Committed(chain) => store.prepare(key, Some(chain), lease),
            Node::Sealing { active, sealed } => {
                match &*sealed.borrow() {
                    Some(Ok(chain)) => return Ok(store.prepare(key, Some(chain), lease)?),
                    Some(Err(error)) => return Err(PrepareError::Below(Arc::clone(error))),
                    None => {}
                }
                match store.prepare_on(key, active, lease) {
                    // It was committed in between: then its chain is known as soon as that is through.
                    Err(error) => {
                        tracing::debug!(%error, "waiting for a layer to be complete");
                        let outcome = async {
                            tokio::select! {
                                biased;
                                chain = self.chain() => chain,
                                () = cancel.wait() => Err(Arc::new(SealError::Cancelled)),
                            }
                        };
                        let chain = tokio::runtime::Handle::current().block_on(outcome);
                        let chain = chain.map_err(PrepareError::Below)?;
                        store.prepare(key, chain.as_ref(), lease)
                    }
                    prepared => prepared,
                }
            }
        };
        Ok(prepared?)
    }

    /// The chain where it is known by now; the inner `None` is an empty root file system.
    #[must_use]
    pub fn known(&self) -> Option<Option<ChainId>> {
        match &*self.node {
            Node::Scratch => Some(None),
            Node::Committed(chain) => Some(Some(*chain)),
            Node::Sealing { sealed, .. } => match &*sealed.borrow() {
                Some(Ok(chain)) => Some(Some(*chain)),
                Some(Err(_)) | None => None,
            },
        }
    }

    /// Waits until it is known that this will never be a layer; for ever when it becomes one.
    pub async fn failed(&self) -> Arc<SealError> {
        match self.chain().await {
            Err(error) => error,
            Ok(_) => std::future::pending().await,
        }
    }

    /// Why this will never be a layer, as far as that is known now.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<SealError>> {
        match &*self.node {
            Node::Sealing { sealed, .. } => match &*sealed.borrow() {
                Some(Err(error)) => Some(Arc::clone(error)),
                _ => None,
            },
            Node::Scratch | Node::Committed(_) => None,
        }
    }

    /// The chain, once it is sealed; `None` for an empty root file system.
    ///
    /// # Errors
    /// When sealing failed.
    pub async fn chain(&self) -> Result<Option<ChainId>, Arc<SealError>> {
        match &*self.node {
            Node::Scratch => Ok(None),
            Node::Committed(chain) => Ok(Some(*chain)),
            Node::Sealing { sealed, .. } => {
                let mut sealed = sealed.clone();
                let outcome = sealed.wait_for(Option::is_some).await;
                match outcome.map(|o| o.clone()) {
                    Ok(Some(Ok(chain))) => Ok(Some(chain)),
                    Ok(Some(Err(e))) => Err(e),
                    _ => Err(Arc::new(SealError::Stopped)),
                }
            }
        }
    }

    fn is(&self, other: &Tip) -> bool {
        Arc::ptr_eq(&self.node, &other.node)
    }
}

/// A key that is known when other layers are complete.
pub struct Later {
    /// Those layers.
    pub tips: Vec<Tip>,
    /// Makes it then; `None` when it cannot be made after all.
    pub key: Box<dyn FnOnce() -> Option<Digest> + Send>,
}

/// A step's files, ready to become a layer.
pub struct Finished {
    /// The snapshot; nobody writes to it and it is mounted nowhere.
    pub active: Active,
    /// What it was prepared on.
    pub below: Tip,
    /// Under which keys its result is found again; the first is its own.
    pub keys: Vec<Digest>,
    /// One more key, which is not known yet.
    pub later: Option<Later>,
    /// When the step ended.
    pub created: SystemTime,
    /// The right to be the one who makes it; kept until others can find it.
    pub lock: Option<CacheLock>,
    /// How the tar is made.
    pub options: LayerOptions,
}

struct Job {
    finished: Finished,
    tip: Tip,
    done: watch::Sender<Option<Outcome>>,
}

/// Seals the layers of one stage, in order, in the background.
pub struct Sealer {
    queue: mpsc::UnboundedSender<Job>,
}

impl Sealer {
    /// Starts one. It ends when it is dropped and has done what was queued, or drops that when `cancel` is set.
    #[must_use]
    pub fn start(store: Store, lease: Arc<Lease>, cancel: Cancel) -> (Sealer, tokio::task::JoinHandle<()>) {
        let (queue, jobs) = mpsc::unbounded_channel();
        let worker = Worker { store, lease, cancel };
        (Sealer { queue }, tokio::spawn(worker.run(jobs)))
    }

    /// Queues a step's files; what comes back can be built upon at once.
    #[must_use]
    pub fn seal(&self, finished: Finished) -> Tip {
        let (done, sealed) = watch::channel(None);
        let tip = Tip {
            node: Arc::new(Node::Sealing {
                active: finished.active.clone(),
                sealed,
            }),
        };
        if let Err(lost) = self.queue.send(Job {
            finished,
            tip: tip.clone(),
            done,
        }) {
            let _ = lost.0.done.send(Some(Err(Arc::new(SealError::Stopped))));
        }
        tip
    }
}

struct Worker {
    store: Store,
    lease: Arc<Lease>,
    cancel: Cancel,
}

impl Worker {
    async fn run(self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let mut next = None;
        let mut later = JoinSet::new();
        loop {
            let first = match next.take() {
                Some(job) => job,
                None => match jobs.recv().await {
                    Some(job) => job,
                    None => break,
                },
            };
            // Whatever has piled up on the first goes with it: one syncfs for all.
            let mut batch: Vec<Job> = vec![first];
            while let Ok(job) = jobs.try_recv() {
                if batch.last().is_some_and(|last| job.finished.below.is(&last.tip)) {
                    batch.push(job);
                } else {
                    next = Some(job);
                    break;
                }
            }
            self.commit(batch, &mut later).await;
        }
        while let Some(ended) = later.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "recording one more key of a layer panicked");
            }
        }
    }

    /// Records a layer under one more key, as soon as that is known.
    fn record_later(&self, later: Later, value: String, chain: ChainId, tasks: &mut JoinSet<()>) {
        let (store, cancel) = (self.store.clone(), self.cancel.clone());
        tasks.spawn(async move {
            for tip in &later.tips {
                let complete = tokio::select! {
                    complete = tip.chain() => complete.is_ok(),
                    () = cancel.wait() => false,
                };
                if !complete {
                    return;
                }
            }
            let Some(key) = (later.key)() else { return };
            let put = tokio::task::spawn_blocking(move || store.cache_put(&key, Some(&chain), &value)).await;
            if let Ok(Err(error)) = put {
                // The layer is found by its own key all the same.
                tracing::warn!(%error, "a shorter way to a layer could not be recorded");
            }
        });
    }

    async fn commit(&self, batch: Vec<Job>, later: &mut JoinSet<()>) {
        let Some(first) = batch.first() else { return };
        let base = tokio::select! {
            base = first.finished.below.chain() => base,
            () = self.cancel.wait() => Err(Arc::new(SealError::Cancelled)),
        };
        let base = match base {
            Ok(base) => base,
            Err(e) => return fail(&batch, &Arc::new(SealError::Below(e))),
        };
        if self.cancel.is_set() {
            return fail(&batch, &Arc::new(SealError::Cancelled));
        }
        let (store, lease) = (self.store.clone(), Arc::clone(&self.lease));
        let blocking = tokio::task::spawn_blocking(move || {
            let sealed = seal(&store, &lease, base.as_ref(), &batch);
            (batch, sealed)
        });
        match blocking.await {
            Ok((batch, Ok(chains))) => {
                for (mut job, chain) in batch.into_iter().zip(chains) {
                    let _ = job.done.send(Some(Ok(chain)));
                    if let Some(more) = job.finished.later.take()
                        && let Some(value) = value_of(&job.finished)
                    {
                        self.record_later(more, value, chain, later);
                    }
                    // Only now: who has waited for the key finds the entry.
                    drop(job.finished.lock);
                }
            }
            Ok((batch, Err(e))) => fail(&batch, &Arc::new(SealError::Store(e))),
            Err(e) => tracing::error!(error = %e, "sealing a layer panicked"),
        }
    }
}

fn fail(batch: &[Job], error: &Arc<SealError>) {
    for job in batch {
        let _ = job.done.send(Some(Err(Arc::clone(error))));
    }
}

/// Hashes, syncs, commits and remembers a row of layers on `base`.
fn seal(
    store: &Store,
    lease: &Lease,
    base: Option<&ChainId>,
    batch: &[Job],
) -> Result<Vec<ChainId>, StoreError> {
    let finished: Vec<(&Active, &LayerOptions)> = batch
        .iter()
        .map(|job| (&job.finished.active, &job.finished.options))
        .collect();
    let layers = store.seal_layers(base, &finished, lease)?;
    for (job, layer) in batch.iter().zip(&layers) {
        let Some(value) = value_of(&job.finished) else {
            continue;
        };
        for key in &job.finished.keys {
            store.cache_put(key, Some(&layer.chain), &value)?;
        }
    }
    Ok(layers.into_iter().map(|l| l.chain).collect())
}

/// What stands under a step's keys; `None` where it has none.
fn value_of(finished: &Finished) -> Option<String> {
    let created_ns = finished
        .created
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_nanos()).ok())
        .unwrap_or_default();
    let key = *finished.keys.first()?;
    serde_json::to_string(&CacheValue { created_ns, key }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_image::OwnerKind;
    use std::time::Duration;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_snapshot_on_a_layer_that_somebody_else_has_made_waits_until_that_is_known() {
        if !crate::tests_as_root::is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), OwnerKind::Build).unwrap();
        let lease = Arc::new(store.lease("test").unwrap());
        let active = store.prepare("a", None, &lease).unwrap();
        let (done, sealed) = watch::channel(None);
        let tip = Tip {
            node: Arc::new(Node::Sealing {
                active: active.clone(),
                sealed,
            }),
        };
        // The same layer is there already, so that this snapshot goes.
        let options = LayerOptions::default();
        let same = store.prepare("same", None, &lease).unwrap();
        store.seal_layers(None, &[(&same, &options)], &lease).unwrap();
        let layers = store.seal_layers(None, &[(&active, &options)], &lease);
        let chain = layers.unwrap()[0].chain;
        store.gc().unwrap();
        let prepare = |key: &'static str, cancel: &Cancel| {
            let (tip, store, lease, cancel) =
                (tip.clone(), store.clone(), Arc::clone(&lease), cancel.clone());
            tokio::task::spawn_blocking(move || tip.prepare(&store, key, &lease, &cancel))
        };
        let (cancel, other) = (Cancel::new(), Cancel::new());
        let waiting = prepare("b", &cancel);
        let given_up = prepare("c", &other);
        other.set();
        let error = given_up.await.unwrap().unwrap_err();
        assert!(matches!(error, PrepareError::Below(e) if e.is_cancelled()));
        // Longer than anything was ever waited for.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert!(!waiting.is_finished());
        done.send(Some(Ok(chain))).unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().key, "b");
    }
}
