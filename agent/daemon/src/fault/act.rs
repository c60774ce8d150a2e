//! Acting on cases: one task a case, one story a container.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use futures_util::future::{join, join_all};
use slipway_gpu::health::Work;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::book::Book;
use super::case::{Case, Key, Target};
use crate::board::{Board, Posted};
use crate::config::{self, FaultAction};
use crate::kube::{Client, Note};
use crate::pods::{Pods, Snapshot};

/// Between two looks at the node.
const LOOK: Duration = Duration::from_millis(500);

/// Who acts.
pub struct Faults {
    pub(super) config: config::Faults,
    pub(super) book: Book,
    board: Board,
    pods: Arc<Pods>,
    /// None: there is no API server to be asked.
    pub(super) client: Option<Client>,
    pub(super) node: String,
    pub(super) notes: mpsc::Sender<Note>,
    /// That slipwayd is not there has been told.
    pub(super) told: AtomicBool,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

impl Faults {
    /// With what the last agent left in `folder`.
    pub fn of(
        config: config::Faults,
        (folder, boot_id): (&std::path::Path, &str),
        board: Board,
        pods: Arc<Pods>,
        (client, node): (Option<Client>, String),
        notes: mpsc::Sender<Note>,
    ) -> Faults {
        Faults {
            config,
            book: Book::open(folder, boot_id),
            board,
            pods,
            client,
            node,
            notes,
            told: AtomicBool::new(false),
        }
    }

    /// Acts for ever. It waits for the driver to have been seen, `patience` at most: then what the last agent knew of health
    /// counts, since a driver that hangs is to keep no container on a GPU on which work is over.
    pub async fn run(self, patience: Duration, mut refusals: mpsc::Receiver<String>) {
        if self.config.action == FaultAction::None {
            return;
        }
        let mut board = self.board.clone();
        let this = Arc::new(self);
        let mut tasks = JoinSet::new();
        let mut open: BTreeSet<Key> = BTreeSet::new();
        let mut silent = Silent::default();
        // GPUs on which a container was kept from starting.
        let mut refused: BTreeSet<String> = BTreeSet::new();
        let mut unseen = Some(Instant::now() + patience);
        loop {
            let posted = Arc::clone(&board.borrow_and_update());
            if !posted.inventory.driver.is_empty() || unseen.is_some_and(|until| until <= Instant::now()) {
                unseen = None;
            }
            if unseen.is_none() {
                silent.look(&posted, Instant::now());
                refused.retain(|gpu| posted.health.of(gpu).is_some());
                this.take_up(&posted, &open, &silent, &refused).await;
                for case in this.book.cases().await {
                    let key = case.key();
                    if !case.is_done() && open.insert(key.clone()) {
                        let this = Arc::clone(&this);
                        tasks.spawn(async move {
                            this.work(case).await;
                            key
                        });
                    }
                }
            }
            tokio::select! {
                changed = board.changed() => if changed.is_err() { return },
                () = until(silent.next(this.config.lost())) => {}
                () = until(unseen) => {}
                Some(gpu) = refusals.recv() => drop(refused.insert(gpu)),
                Some(ended) = tasks.join_next() => if let Ok(key) = ended {
                    open.remove(&key);
                },
            }
        }
    }

    /// Opens cases of what has become sick, and forgets those that are over.
    async fn take_up(
        &self,
        posted: &Posted,
        open: &BTreeSet<Key>,
        silent: &Silent,
        refused: &BTreeSet<String>,
    ) {
        let sick: Vec<_> = posted.health.unhealthy().collect();
        self.book
            .keep_only(|c| {
                open.contains(&c.key())
                    || !c.is_done() && c.is_announced()
                    || sick.iter().any(|(gpu, u)| c.is_about(gpu, u))
            })
            .await;
        let known = self.book.cases().await;
        for (uuid, unhealthy) in sick {
            let before = known.iter().find(|c| c.is_about(uuid, unhealthy));
            if before.is_some_and(|c| !c.only_waiting) {
                continue;
            }
            let index = posted.inventory.gpus.iter().find(|g| g.uuid == uuid);
            let index = index.map_or(0, |g| g.index);
            let lost = silent.is_lost(uuid, self.config.lost());
            // What nobody else would do about it: a container that is kept from starting waits for the GPU for ever.
            let waits = refused.contains(uuid) && self.config.action == FaultAction::FailAndEvict;
            if let Some(case) = Case::of((uuid, index), unhealthy, (lost, waits), now())
                // Work that could go on may be over now: that is another case.
                && (before.is_none() || !case.only_waiting)
            {
                self.book.put(case).await;
            }
        }
    }

    pub(super) fn is_sick(&self, case: &Case) -> bool {
        let posted = self.board.borrow();
        posted
            .health
            .of(&case.gpu)
            .is_some_and(|u| case.is_about(&case.gpu, u))
    }

    /// One case, to its end.
    async fn work(&self, case: Case) {
        let all: Vec<usize> = match &case.targets {
            Some(known) => (0..known.len()).collect(),
            None => self.find(&case).await,
        };
        join_all(all.iter().map(|n| self.announce(&case, *n))).await;
        self.wait_for_the_node(&case).await;
        // A pod that kubelet was placing on it when it fell sick may have been told of late.
        let late = async {
            let late = self.find(&case).await;
            join_all(late.iter().map(|n| async {
                self.announce(&case, *n).await;
                self.end(&case, *n).await;
            }))
            .await
        };
        join(join_all(all.iter().map(|n| self.end(&case, *n))), late).await;
    }

    /// Writes down who has the GPU or a part of it and is not known yet; their places in the case. Nobody, when it is well
    /// again before kubelet says, or another case has come in the place of this one.
    async fn find(&self, case: &Case) -> Vec<usize> {
        let mut told = false;
        while self.is_sick(case) && self.book.has(case).await {
            match self.pods.anew().await {
                Ok(snapshot) => {
                    let new = self.book.found(case, self.holders(case, &snapshot)).await;
                    tracing::warn!(
                        gpu = case.gpu,
                        xid = case.xid,
                        action = ?self.config.action,
                        containers = new.len(),
                        "those who have the GPU are ended"
                    );
                    return new;
                }
                Err(e) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!(
                        gpu = case.gpu,
                        error = e.message(),
                        "kubelet does not say who has the GPU; asking on"
                    );
                }
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Vec::new()
    }

    /// Who has the GPU or a part of it, as kubelet says.
    fn holders(&self, case: &Case, snapshot: &Snapshot) -> Vec<Target> {
        let posted = Arc::clone(&self.board.borrow());
        let parts = posted.inventory.gpus.iter().filter(|g| g.uuid == case.gpu);
        let parts = parts.flat_map(|g| g.mig_devices.iter().map(|m| m.uuid.clone()));
        let items = posted.items.values().flatten().filter(|i| i.gpu == case.gpu);
        let devices: BTreeSet<String> = parts
            .chain(items.map(|i| i.uuid.clone()))
            .chain([case.gpu.clone()])
            .collect();
        let holders = devices.iter().flat_map(|d| snapshot.holders(d));
        let holders: BTreeSet<_> = holders.map(|(_, holder)| holder.clone()).collect();
        holders.iter().map(|h| Target::of(h, snapshot)).collect()
    }

    /// Asks kubelet again whose UIDs and ids it has not told.
    pub(super) async fn ask_kubelet(&self, case: &Case) {
        match self.pods.anew().await {
            Ok(snapshot) => self.book.told(case, self.holders(case, &snapshot)).await,
            Err(e) => tracing::debug!(error = e.message(), "kubelet does not say who has the GPU"),
        }
    }

    /// Until no replacement can be placed on the GPU: the node's allocatable has fallen. Where nobody can say so, as long as
    /// that usually takes.
    async fn wait_for_the_node(&self, case: &Case) {
        let passed = now().saturating_sub(case.opened);
        let until = Instant::now() + Duration::from_secs(self.config.wait_seconds.saturating_sub(passed));
        while Instant::now() < until {
            if let Some(client) = &self.client
                && let Ok(node) = client.get(&format!("/api/v1/nodes/{}", self.node)).await
                && has_fallen(&node, &self.board.borrow(), &case.gpu)
            {
                return;
            }
            tokio::time::sleep(LOOK.min(until.saturating_duration_since(Instant::now()))).await;
        }
        tracing::debug!(
            gpu = case.gpu,
            "the node's allocatable is not known to have fallen"
        );
    }

    pub(super) async fn target(&self, case: &Case, n: usize) -> Option<Target> {
        let cases = self.book.cases().await;
        let same = cases.into_iter().find(|c| c.key() == case.key())?;
        same.targets?.into_iter().nth(n)
    }
}

/// GPUs that do not answer, and since when that is seen.
#[derive(Debug, Default)]
struct Silent(BTreeMap<String, Instant>);

impl Silent {
    /// Where none answers, it is the driver that does not: work on them may well go on. Of one that an XID has condemned it is
    /// not known.
    fn look(&mut self, posted: &Posted, now: Instant) {
        let silent = |gpu: &str| posted.health.of(gpu).is_some_and(|u| u.work == Work::Silent);
        let answers = |gpu: &str| posted.health.of(gpu).is_none_or(|u| u.sign.is_some());
        let seen = !posted.inventory.driver.is_empty();
        let driver = seen && posted.inventory.gpus.iter().any(|g| answers(&g.uuid));
        self.0.retain(|gpu, _| driver && silent(gpu));
        for gpu in posted.inventory.gpus.iter().filter(|g| driver && silent(&g.uuid)) {
            self.0.entry(gpu.uuid.clone()).or_insert(now);
        }
    }

    fn is_lost(&self, gpu: &str, patience: Option<Duration>) -> bool {
        let since = self.0.get(gpu).zip(patience);
        since.is_some_and(|(since, patience)| since.elapsed() >= patience)
    }

    /// When the next of them is lost.
    fn next(&self, patience: Option<Duration>) -> Option<Instant> {
        let all = self.0.values().map(|since| Some(*since + patience?));
        all.flatten().filter(|at| *at > Instant::now()).min()
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whether the node hands out no more of each of a GPU's resources than are well.
fn has_fallen(node: &serde_json::Value, posted: &Posted, gpu: &str) -> bool {
    let allocatable = &node["status"]["allocatable"];
    let of_it = posted
        .items
        .iter()
        .filter(|(_, items)| items.iter().any(|i| i.gpu == gpu));
    // Before the driver has been seen, it is not known what it is handed out as.
    !posted.items.is_empty()
        && of_it.into_iter().all(|(resource, items)| {
            let well = items.iter().filter(|i| i.unhealthy.is_none()).count();
            let told = allocatable[resource]
                .as_str()
                .and_then(|n| n.parse::<usize>().ok());
            told.unwrap_or(0) <= well
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Item;
    use serde_json::json;

    #[test]
    fn the_node_has_fallen_when_it_hands_out_what_is_well_of_every_resource_of_the_gpu() {
        let item = |gpu: &str, sick: bool| Item {
            id: gpu.into(),
            uuid: gpu.into(),
            gpu: gpu.into(),
            numa: None,
            unhealthy: sick.then(|| "XID 79".to_owned()),
        };
        let posted = Posted {
            items: [
                (
                    "n/gpu".to_owned(),
                    vec![item("GPU-1", true), item("GPU-2", false)],
                ),
                ("n/mig".to_owned(), vec![item("GPU-1", true)]),
                ("n/other".to_owned(), vec![item("GPU-2", false)]),
            ]
            .into(),
            ..Posted::default()
        };
        let fallen = |gpus: &str, slices: &str| {
            let node =
                json!({ "status": { "allocatable": { "n/gpu": gpus, "n/mig": slices, "n/other": "7" } } });
            has_fallen(&node, &posted, "GPU-1")
        };
        assert!(!fallen("2", "0") && !fallen("1", "1") && fallen("1", "0") && fallen("0", "0"));
        assert!(
            has_fallen(&json!({}), &posted, "GPU-1"),
            "a resource that is gone"
        );
        assert!(!has_fallen(&json!({}), &Posted::default(), "GPU-1"));
    }
}
