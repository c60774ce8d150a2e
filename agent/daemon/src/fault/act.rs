//! Acting on cases: one task a case, one story a container.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use slipway_fault_api::v1::FailContainerRequest;
use slipway_gpu::health::Work;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::book::Book;
use super::case::{Case, Pod, Target};
use super::evict::{self, Evicted};
use super::runtime::{self, AskError, Ended};
use crate::board::{Board, Posted};
use crate::cause::chain;
use crate::config::{self, FaultAction};
use crate::kube::{Client, KubeError, Note};
use crate::pods::Pods;

/// How long slipwayd is waited for, which may be being restarted.
const RUNTIME: Duration = Duration::from_secs(10);
/// How long the API server is waited for before a container is ended without its pod being known.
const API: Duration = Duration::from_secs(10);
/// Between two looks at the node.
const LOOK: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// For how much longer than everything else takes a container has no successor.
const HOLD: u64 = 60;

/// Who acts.
pub struct Faults {
    config: config::Faults,
    book: Book,
    board: Board,
    pods: Arc<Pods>,
    /// None: there is no API server to be asked.
    client: Option<Client>,
    node: String,
    notes: mpsc::Sender<Note>,
    /// That slipwayd is not there has been told.
    told: AtomicBool,
}

fn now() -> u64 {
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

    /// Acts for ever.
    pub async fn run(self) {
        if self.config.action == FaultAction::None {
            return;
        }
        let mut board = self.board.clone();
        let this = Arc::new(self);
        let mut tasks = JoinSet::new();
        // By GPU and since when.
        let mut open: BTreeSet<(String, u64)> = BTreeSet::new();
        let mut silent = Silent::default();
        loop {
            let posted = Arc::clone(&board.borrow_and_update());
            // Before that, nothing is known.
            if !posted.inventory.driver.is_empty() {
                silent.look(&posted, Instant::now());
                this.take_up(&posted, &open, &silent).await;
                for case in this.book.cases().await {
                    let key = (case.gpu.clone(), case.since);
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
                Some(ended) = tasks.join_next() => if let Ok(key) = ended {
                    open.remove(&key);
                },
            }
        }
    }

    /// Opens cases of what has become sick, and forgets those that are over.
    async fn take_up(&self, posted: &Posted, open: &BTreeSet<(String, u64)>, silent: &Silent) {
        let sick: Vec<_> = posted.health.unhealthy().collect();
        self.book
            .keep_only(|c| {
                open.contains(&(c.gpu.clone(), c.since))
                    || !c.is_done()
                    || sick.iter().any(|(gpu, u)| c.is_about(gpu, u))
            })
            .await;
        let known = self.book.cases().await;
        for (uuid, unhealthy) in sick {
            if known.iter().any(|c| c.is_about(uuid, unhealthy)) {
                continue;
            }
            let index = posted.inventory.gpus.iter().find(|g| g.uuid == uuid);
            let index = index.map_or(0, |g| g.index);
            let lost = silent.is_lost(uuid, self.config.lost());
            if let Some(case) = Case::of(uuid, index, unhealthy, lost, now()) {
                self.book.put(case).await;
            }
        }
    }

    fn is_sick(&self, case: &Case) -> bool {
        let posted = self.board.borrow();
        posted
            .health
            .of(&case.gpu)
            .is_some_and(|u| case.is_about(&case.gpu, u))
    }

    /// One case, to its end.
    async fn work(&self, mut case: Case) {
        if case.targets.is_none() {
            case.targets = self.holders(&case).await;
            self.book.put(case.clone()).await;
        }
        let targets = case.targets.clone().unwrap_or_default();
        tracing::warn!(
            gpu = case.gpu,
            xid = case.xid,
            action = ?self.config.action,
            containers = ?targets.iter().map(|t| format!("{}/{}/{}", t.namespace, t.pod, t.container)).collect::<Vec<_>>(),
            "those who have the GPU are ended"
        );
        if targets.iter().all(|t| t.done) {
            return;
        }
        let each = || targets.iter().enumerate().filter(|(_, t)| !t.done);
        join_all(each().map(|(n, target)| self.announce(&case, n, target))).await;
        self.wait_for_the_node(&case).await;
        join_all(each().map(|(n, _)| self.end(&case, n))).await;
    }

    /// The containers that have the GPU or a part of it. Nobody, when it is well again before kubelet says.
    async fn holders(&self, case: &Case) -> Option<Vec<Target>> {
        let mut told = false;
        loop {
            match self.pods.now().await {
                Ok(snapshot) => {
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
                    return Some(holders.iter().map(|h| Target::of(h, &snapshot)).collect());
                }
                Err(_) if !self.is_sick(case) => return Some(Vec::new()),
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
    }

    /// Has the runtime know why the container will end, and start no other: it may end by itself at any moment.
    async fn announce(&self, case: &Case, n: usize, target: &Target) {
        if let Some(Ok(Ended::Announced)) = self.ask(case, target, true).await {
            self.book.target(case, n, |t| t.announced = true).await;
        }
    }

    /// Asks slipwayd; none: nothing to be asked for, as the container is not known, or it has no such service.
    async fn ask(
        &self,
        case: &Case,
        target: &Target,
        only_announce: bool,
    ) -> Option<Result<Ended, AskError>> {
        let (uid, id) = (target.uid.clone()?, target.id.clone()?);
        let evicts = self.config.action == FaultAction::FailAndEvict;
        let hold = self.config.wait_seconds + HOLD;
        let request = FailContainerRequest {
            pod_uid: uid,
            container: target.container.clone(),
            container_id: id,
            reason: case.reason(),
            message: case.message(),
            only_announce,
            hold_seconds: if evicts {
                u32::try_from(hold).unwrap_or(u32::MAX)
            } else {
                0
            },
        };
        let until = Instant::now() + RUNTIME;
        loop {
            let asked = runtime::fail(self.config.socket.clone(), request.clone()).await;
            match asked {
                Err(AskError::Absent { .. })
                    if Instant::now() < until && !self.told.load(Ordering::Relaxed) =>
                {
                    tokio::time::sleep(FIRST_PAUSE).await;
                }
                Err(e @ AskError::Absent { .. }) => {
                    if !self.told.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            error = chain(&e),
                            "containers cannot be failed here (faults.socket): their pods are evicted where they may be"
                        );
                    }
                    return None;
                }
                asked => {
                    self.told.store(false, Ordering::Relaxed);
                    return Some(asked);
                }
            }
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

    async fn target(&self, case: &Case, n: usize) -> Option<Target> {
        let cases = self.book.cases().await;
        let same = cases
            .into_iter()
            .find(|c| c.gpu == case.gpu && c.since == case.since)?;
        same.targets?.into_iter().nth(n)
    }

    /// One container and its pod, to their end.
    async fn end(&self, case: &Case, n: usize) {
        let Some(mut target) = self.target(case, n).await else {
            return;
        };
        let began = Instant::now();
        let patience = Duration::from_secs(self.config.evict_seconds);
        let (mut killed, mut blocked) = (false, None::<Instant>);
        let (mut pause, mut said) = (FIRST_PAUSE, String::new());
        loop {
            let sick = self.is_sick(case);
            // Nothing has been done to it yet, or nothing more is needed.
            if !sick && (killed || !target.announced) {
                break;
            }
            let why = match self.step(case, &mut target, killed).await {
                Ok(Step::Done) => break,
                Ok(Step::Kill) => {
                    self.kill(case, &target).await;
                    break;
                }
                Ok(Step::Blocked(why, pod)) => {
                    let since = *blocked.get_or_insert_with(Instant::now);
                    if !patience.is_zero() && since.elapsed() >= patience {
                        self.delete(case, &target, &pod, patience).await;
                        break;
                    }
                    why
                }
                Err(e) => chain(&e),
            };
            if why != said {
                tracing::warn!(
                    namespace = target.namespace,
                    pod = target.pod,
                    why,
                    "the pod is not evicted; trying on"
                );
                said = why;
            }
            if !killed && (blocked.is_some() || began.elapsed() > API) {
                self.kill(case, &target).await;
                killed = true;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
        self.book.target(case, n, |t| t.done = true).await;
    }

    /// What is to be done about it now, as the API server knows its pod.
    async fn step(&self, case: &Case, target: &mut Target, killed: bool) -> Result<Step, KubeError> {
        let Some(client) = &self.client else {
            return Ok(Step::Kill);
        };
        let pod = match evict::look(client, target).await {
            Ok(Some(pod)) => pod,
            Ok(None) => return Ok(Step::Done),
            Err(e) if self.config.action == FaultAction::Fail => {
                tracing::debug!(error = chain(&e), "the pod is not known");
                return Ok(Step::Kill);
            }
            Err(e) => return Err(e),
        };
        if pod.ended {
            return Ok(Step::Done);
        }
        target.uid.get_or_insert_with(|| pod.uid.clone());
        // Whatever this pod has in it now has the GPU: that is the pod's.
        if target.id.is_none() && self.is_sick(case) {
            target.id.clone_from(&pod.id);
        }
        // One that has not started waits for the GPU for ever; one that cannot be failed ends in no other way.
        let stays = !pod.restarts && target.id.is_some() && !self.told.load(Ordering::Relaxed);
        if self.config.action == FaultAction::Fail || pod.leaves || pod.is_static || stays {
            return Ok(if killed { Step::Done } else { Step::Kill });
        }
        match evict::evict(client, target, &pod).await? {
            Evicted::Done => {
                let text = format!("the pod is evicted: {}", case.message());
                self.note(target, "GpuFaultEvicted", text);
                Ok(if killed { Step::Done } else { Step::Kill })
            }
            Evicted::Gone => Ok(Step::Done),
            Evicted::Blocked(why) => Ok(Step::Blocked(why, pod)),
            Evicted::Forbidden(e) => {
                tracing::error!(error = chain(&e), pod = target.pod, "the pod cannot be evicted");
                Ok(if killed { Step::Done } else { Step::Kill })
            }
        }
    }

    async fn delete(&self, case: &Case, target: &Target, pod: &Pod, patience: Duration) {
        let Some(client) = &self.client else { return };
        match evict::delete(client, target, pod).await {
            Ok(Evicted::Done) => {
                let said = format!(
                    "the pod is deleted, as a disruption budget has not let it be evicted for {} s: {}",
                    patience.as_secs(),
                    case.message()
                );
                self.note(target, "GpuFaultDeleted", said);
            }
            Ok(Evicted::Gone) => {}
            Ok(Evicted::Blocked(why)) => tracing::error!(pod = target.pod, why, "the pod cannot be deleted"),
            Ok(Evicted::Forbidden(e)) | Err(e) => {
                tracing::error!(error = chain(&e), pod = target.pod, "the pod cannot be deleted");
            }
        }
    }

    /// Ends the container now.
    async fn kill(&self, case: &Case, target: &Target) {
        let (namespace, pod, container) = (&target.namespace, &target.pod, &target.container);
        match self.ask(case, target, false).await {
            None => {}
            Some(Ok(Ended::Failed(code))) => {
                let text = format!(
                    "the container is ended ({}, exit code {code}): {}",
                    case.reason(),
                    case.message()
                );
                tracing::warn!(namespace, pod, container, "{text}");
                self.note(target, "GpuFaultFailed", text);
            }
            Some(Ok(Ended::Gone | Ended::Announced)) => {
                tracing::info!(namespace, pod, container, "the container had ended by itself");
            }
            Some(Ok(Ended::Dying(why))) => {
                tracing::error!(
                    namespace,
                    pod,
                    container,
                    why,
                    "the container is killed and does not die"
                );
            }
            Some(Err(e)) => {
                tracing::error!(
                    namespace,
                    pod,
                    container,
                    error = chain(&e),
                    "the container is not failed"
                );
            }
        }
    }

    fn note(&self, target: &Target, reason: &'static str, message: String) {
        let note = Note {
            about: Some(target.holder()),
            reason,
            message,
            warning: true,
            at: now(),
        };
        // Nobody listens: there is no API server to tell.
        let _ = self.notes.try_send(note);
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
        let driver = posted.inventory.gpus.iter().any(|g| answers(&g.uuid));
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

/// What is to be done about a pod.
enum Step {
    /// Nothing more.
    Done,
    /// The container is to be ended, and then nothing more.
    Kill,
    /// Its eviction is not allowed now, and why.
    Blocked(String, Pod),
}

/// Whether the node hands out no more of each of a GPU's resources than are well.
fn has_fallen(node: &serde_json::Value, posted: &Posted, gpu: &str) -> bool {
    let allocatable = &node["status"]["allocatable"];
    let of_it = posted
        .items
        .iter()
        .filter(|(_, items)| items.iter().any(|i| i.gpu == gpu));
    of_it.into_iter().all(|(resource, items)| {
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
    }
}
