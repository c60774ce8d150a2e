//! What a start finds: the records of pods and containers, and what is left of them. First every shim is asked what it knows,
//! so that what clients are told is true; then each pod is finished or undone, and the directories are swept of what no
//! record knows. What takes long goes on beside serving: a status that is not known yet is not told (`pod::known`).
//!
//! ```text
//! pod's phase   its shim answers                its shim is gone                another boot
//! Starting      undone                          undone                          undone
//! Ready         reconciled, watched             buried; NotReady                NotReady, network given back
//! NotReady      reconciled, watched             settled                         network given back
//! Stopping      finished                        finished                        finished
//! Stopped       let go                          settled                         settled
//! Removing      finished                        finished                        finished
//! ```
//! A pod or container with a record that cannot be read is not recovered: it stays as it is, with everything that belongs
//! to it (a pod's containers, its shim, its network), and is told of by Status. Its pod may be: stopping that ends it too.
//!
//! On another boot nothing is signalled: pids and namespaces of the records are somebody else's by now.

mod builds;
pub mod janitor;
pub(crate) mod reconcile;
mod sweep;

use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::{Shim, pod as wire};
use tokio::task::JoinSet;

use crate::container::{Container, exit, remove as remove_container};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::fail;
use crate::pod::dir::PodDir;
use crate::pod::{Pod, network, remove, stop, watch};
use crate::records::{
    ContainerPhase, ContainerRecord, ContainerState, Exited, Kind, NetworkRelease, PodPhase, PodRecord,
    PodState, Unreadable,
};

/// Pods recovered at once.
const AT_ONCE: usize = 8;
/// Shims asked at once: each that hangs takes one of them.
const ASKED_AT_ONCE: usize = 64;
/// How long clients wait for all of it: most starts take a fraction of this. What takes longer goes on beside serving.
const PATIENCE: Duration = Duration::from_secs(3);
/// The exit code of a container whose real one nobody knows.
const UNKNOWN: i32 = 255;

/// Recovers everything, or begins to: what another boot has ended is known on return; the rest when it did not take
/// longer than [`PATIENCE`]. What fails is told and left to the janitor: one bad pod must not keep the node down.
pub async fn recover(daemon: &Arc<Daemon>) -> Result<(), Error> {
    load(daemon).await?;
    for pod in daemon.registry.pods() {
        if pod.record().boot_id == daemon.boot_id {
            continue;
        }
        match after_reboot(daemon, &pod).await {
            Ok(()) => pod.known.set(true),
            Err(error) => {
                tracing::error!(pod = %pod.id(), error = error.chain(), "what the reboot ended could not be recorded; trying again later");
            }
        }
    }
    let until = tokio::time::Instant::now() + PATIENCE;
    let asked = daemon.background.spawn(ask_all(daemon.clone()));
    if tokio::time::timeout_at(until, asked).await.is_err() {
        tracing::warn!("not every shim has said yet what has become of its pod; serving what is known");
    }
    let rest = daemon.background.spawn(finish(daemon.clone()));
    if tokio::time::timeout_at(until, rest).await.is_err() {
        tracing::warn!("what was left takes long to be finished; serving meanwhile");
    }
    Ok(())
}

/// Makes every record say what the pod's shim knows, and nothing else.
async fn ask_all(daemon: Arc<Daemon>) {
    let pods = daemon.registry.pods().into_iter();
    // Nobody has been told of one that is still starting.
    let pods = pods.filter(|pod| pod.record().boot_id == daemon.boot_id && pod.phase() != PodPhase::Starting);
    each(&daemon, pods.collect(), ASKED_AT_ONCE, |daemon, pod| async move {
        let _turn = pod.begin("its recovery").await?;
        ask(&daemon, &pod).await
    })
    .await;
}

/// Everything that may take its time. Verbs of clients wait for their turn on a pod that is at it.
async fn finish(daemon: Arc<Daemon>) {
    let daemon = &daemon;
    let pods = daemon.registry.pods();
    let count = pods.len();
    let (alive, half_done): (Vec<_>, Vec<_>) = pods.into_iter().partition(|pod| {
        matches!(
            pod.phase(),
            PodPhase::Ready | PodPhase::NotReady { .. } | PodPhase::Stopped
        )
    });
    recover_all(daemon, alive).await;
    let beside = async {
        remove_orphans(daemon).await;
        if let Err(error) = sweep::sweep(daemon).await {
            tracing::error!(error = error.chain(), "the directories could not be swept");
        }
    };
    let builds = async {
        if let Err(error) = builds::bury(daemon).await {
            tracing::error!(error = error.chain(), "dead builds could not be looked for");
        }
    };
    let releases = async {
        let mut tries = JoinSet::new();
        for release in daemon.releases.all() {
            let daemon = daemon.clone();
            tries.spawn(async move {
                if let Err(error) = network::retry_release(&daemon, &release.pod).await {
                    let error = error.chain();
                    tracing::warn!(pod = %release.pod, error, "a network could not be released; trying again later");
                }
            });
        }
        while tries.join_next().await.is_some() {}
    };
    tokio::join!(recover_all(daemon, half_done), beside, builds, releases);
    daemon.janitor.wake();
    if count > 0 {
        tracing::info!(
            pods = count,
            containers = daemon.registry.containers().len(),
            "recovered"
        );
    }
}

async fn recover_all(daemon: &Arc<Daemon>, pods: Vec<Arc<Pod>>) {
    each(daemon, pods, AT_ONCE, |daemon, pod| async move {
        recover_pod(&daemon, &pod).await
    })
    .await;
}

/// Does something to each pod, to so many at once. What fails is told and left to the janitor.
async fn each<Done>(
    daemon: &Arc<Daemon>,
    pods: Vec<Arc<Pod>>,
    at_once: usize,
    act: impl Fn(Arc<Daemon>, Arc<Pod>) -> Done,
) where
    Done: Future<Output = Result<(), Error>> + Send + 'static,
{
    let mut pods = pods.into_iter();
    let mut tries = JoinSet::new();
    loop {
        while tries.len() < at_once
            && let Some(pod) = pods.next()
        {
            let daemon = daemon.clone();
            let trying = act(daemon.clone(), pod.clone());
            tries.spawn(async move {
                if let Err(error) = trying.await {
                    let error = error.chain();
                    tracing::error!(pod = %pod.id(), error, "a pod could not be recovered; trying again later");
                    daemon.janitor.wake();
                }
            });
        }
        if tries.join_next().await.is_none() {
            return;
        }
    }
}

/// Fills the registry from the records.
async fn load(daemon: &Arc<Daemon>) -> Result<(), Error> {
    let mut unreadable = Unreadable::default();
    let mut states = daemon
        .records
        .list::<PodState>(Kind::PodState, &mut unreadable)
        .await?;
    for (id, record) in daemon
        .records
        .list::<PodRecord>(Kind::Pod, &mut unreadable)
        .await?
    {
        if unreadable.contains(&id) {
            continue;
        }
        let state = states.remove(&id).unwrap_or_else(PodState::starting);
        let pod = Pod::new(record, state);
        pod.known.set(false);
        daemon.registry.insert_pod(Arc::new(pod));
    }
    // A state without a record is the end of a deletion.
    for id in states.keys().filter(|id| !unreadable.contains(id)) {
        daemon.records.delete(Kind::PodState, id).await?;
    }
    let mut states = daemon
        .records
        .list::<ContainerState>(Kind::ContainerState, &mut unreadable)
        .await?;
    for (id, record) in daemon
        .records
        .list::<ContainerRecord>(Kind::Container, &mut unreadable)
        .await?
    {
        if unreadable.contains(&id) {
            continue;
        }
        if unreadable.contains(record.pod.as_str()) {
            let why = format!("its pod {} cannot be read", record.pod);
            unreadable.note(Kind::Container, id, why);
            continue;
        }
        let container = match states.remove(&id) {
            Some(state) => Container::new(record, state),
            None => Container::creating(record),
        };
        daemon.registry.insert_container(Arc::new(container));
    }
    for id in states.keys().filter(|id| !unreadable.contains(id)) {
        daemon.records.delete(Kind::ContainerState, id).await?;
    }
    for (_, release) in daemon
        .records
        .list::<NetworkRelease>(Kind::NetworkRelease, &mut unreadable)
        .await?
    {
        if !unreadable.contains(release.pod.as_str()) {
            daemon.releases.insert(release);
        }
    }
    daemon.registry.set_unreadable(unreadable);
    Ok(())
}

/// Brings one pod to a state that is true. Also the janitor's way of trying again.
pub async fn recover_pod(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    let turn = pod.begin("its recovery").await?;
    if pod.record().boot_id != daemon.boot_id {
        after_reboot(daemon, pod).await?;
        pod.known.set(true);
        let dir = PodDir::new(&daemon.paths.pods, pod.id());
        crate::blocking::run(move || dir.remove()).await?;
    } else {
        ask(daemon, pod).await?;
    }
    match pod.phase() {
        PodPhase::Starting | PodPhase::Removing => {
            pod.note_removing(&daemon.records).await?;
            return remove::tear_down(daemon, pod, false).await;
        }
        PodPhase::Stopping => stop::stop_held(daemon, pod).await?,
        PodPhase::Stopped if pod.shim().is_some() => stop::halt(daemon, pod).await?,
        PodPhase::Ready | PodPhase::NotReady { .. } | PodPhase::Stopped => {}
    }
    let finished = finish_containers(daemon, pod).await;
    // Nobody's verb has to wait for a kernel that takes long over a limit.
    drop(turn);
    reconcile::tidy(daemon, pod).await;
    finished
}

/// Takes a shim for the pod's and makes its records say what that knows. One of which they do not is not the pod's: it is
/// connected to again. [`reconcile::tidy`] is for later.
///
/// # Errors
/// When what it says cannot be noted.
pub async fn follow(
    daemon: &Arc<Daemon>,
    pod: &Arc<Pod>,
    shim: &Shim,
    info: &wire::InfoResponse,
) -> Result<(), Error> {
    let before = reconcile::Before::of(daemon, pod);
    pod.set_shim(Some(shim.clone()));
    let noted = async {
        fail::point("recover.follow").await?;
        reconcile::note(daemon, pod, &before, info).await
    };
    noted.await.inspect_err(|_| drop(pod.set_shim(None)))?;
    pod.known.set(true);
    Ok(())
}

/// Connects to the shim of a pod that has none and compares notes; a dead one is buried.
async fn ask(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    if pod.shim().is_some() {
        return Ok(());
    }
    let answer = match reach(daemon, pod).await {
        // Nothing of it runs, whatever the shim says.
        Err(_) if pod.phase() == PodPhase::Stopped => None,
        answer => answer?,
    };
    match answer {
        Some((shim, info)) => {
            follow(daemon, pod, &shim, &info).await?;
            if matches!(pod.phase(), PodPhase::Ready | PodPhase::NotReady { .. }) {
                watch::spawn(daemon, pod, shim, info.last_event);
            }
        }
        None if pod.phase() == PodPhase::Stopped => {}
        None => {
            if pod.phase() == PodPhase::Ready {
                tracing::error!(pod = %pod.id(), "the pod's shim died while slipwayd was away");
            }
            watch::bury(daemon, pod, "the pod's shim ended while slipwayd was away").await?;
            watch::not_ready(daemon, pod, "its shim ended while slipwayd was away").await?;
        }
    }
    pod.known.set(true);
    Ok(())
}

/// The pod's shim, with what it knows; `None` when it is dead.
///
/// # Errors
/// When somebody listens and gives no such answer: slow or of another version is not dead, and may answer later.
pub async fn reach(daemon: &Daemon, pod: &Pod) -> Result<Option<(Shim, wire::InfoResponse)>, Error> {
    let dir = PodDir::new(&daemon.paths.pods, pod.id());
    let answer = match daemon.launcher.connect(dir.path()).await {
        Ok(shim) => shim.info().await.map(|info| (shim, info)),
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(slipway_shim_client::Error::Gone) => Ok(None),
        Err(error) => match dir.path().exists() {
            true => Err(Error::shim("reconnect to the shim", pod.id())(error)),
            false => Ok(None),
        },
    }
}

/// Nothing of it lives: that is written down, and that its addresses have to be given back with what ADD left.
async fn after_reboot(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    for container in daemon.registry.containers_of(pod.id()) {
        let exit = Exited {
            finished_at_ns: crate::time::now_ns(),
            code: UNKNOWN,
            reason: "Unknown".to_owned(),
            message: "the node was rebooted while it existed".to_owned(),
            ..Exited::default()
        };
        exit::note(daemon, &container, exit).await?;
    }
    watch::not_ready(daemon, pod, "the node was rebooted").await?;
    network::hand_over(daemon, pod).await
}

/// Undoes containers that never came to be, finishes removals, settles the ended. One that cannot be seen to keeps no other
/// from it. Those that were failed and live are the janitor's: what hangs in a driver may take long to die.
async fn finish_containers(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<(), Error> {
    let mut finished = Ok(());
    for container in daemon.registry.containers_of(pod.id()) {
        finished = finished.and(finish_container(daemon, &container).await);
    }
    finished
}

async fn finish_container(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Result<(), Error> {
    match container.phase() {
        ContainerPhase::Creating | ContainerPhase::Removing(_) => {
            let _turn = container.begin("its recovery").await?;
            remove_container::remove_held(daemon, container).await
        }
        ContainerPhase::Exited(_) => exit::settle(daemon, container).await,
        ContainerPhase::Created | ContainerPhase::Running { .. } => Ok(()),
    }
}

/// Containers whose pod is gone: its removal was interrupted. One whose pod cannot be read is not among them.
async fn remove_orphans(daemon: &Arc<Daemon>) {
    for container in daemon.registry.containers() {
        if daemon.registry.pod(container.pod().as_str()).is_ok() {
            continue;
        }
        let Ok(_turn) = container.begin("its recovery").await else {
            continue;
        };
        if daemon.registry.container(container.id().as_str()).is_err() {
            continue;
        }
        tracing::warn!(container = %container.id(), pod = %container.pod(), "a container without its pod is removed");
        if let Err(error) = remove_container::tear_down(daemon, &container).await {
            tracing::error!(container = %container.id(), error = error.chain(), "it could not be removed");
        }
    }
}

/// An end nobody saw: the shim does not know the container any more.
fn unknown_exit() -> Exited {
    Exited {
        finished_at_ns: crate::time::now_ns(),
        code: UNKNOWN,
        reason: "Unknown".to_owned(),
        message: "its shim does not know it any more".to_owned(),
        ..Exited::default()
    }
}
