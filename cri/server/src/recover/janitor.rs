//! What could not be done or undone is tried again here, with patience: networks to be released, removals that failed,
//! shims to be buried. Each has its own pauses, which grow, and its own tries, of which a few run at once: one that hangs
//! holds up nothing else. It sleeps until somebody leaves it work. Dead
//! builds are looked for beside it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::container::{fault, remove as containers};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::ids::{ContainerId, PodId};
use crate::pod::network;
use crate::records::{ContainerPhase, PodPhase};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Between two looks for builds that died while we run.
const BUILDS: Duration = Duration::from_secs(60);
/// Tries at once.
const AT_ONCE: usize = 16;

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

/// Something unfinished.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Task {
    Release(PodId),
    Pod(PodId),
    Container(ContainerId),
    /// Failed, and not dead.
    Fault(ContainerId),
}

/// When each is tried next.
#[derive(Debug, Default)]
struct Plan {
    tasks: HashMap<Task, Turn>,
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    /// `None`: a try is on its way.
    next: Option<Instant>,
    pause: Duration,
}

impl Plan {
    /// Takes up what is new, drops what somebody else has finished.
    fn look(&mut self, unfinished: Vec<Task>, now: Instant) {
        self.tasks
            .retain(|task, turn| turn.next.is_none() || unfinished.contains(task));
        for task in unfinished {
            self.tasks.entry(task).or_insert(Turn {
                next: Some(now + FIRST_PAUSE),
                pause: FIRST_PAUSE,
            });
        }
    }

    /// The one that has been due for longest; it counts as being tried.
    fn take_due(&mut self, now: Instant) -> Option<Task> {
        let due = self.tasks.iter_mut().filter_map(|(task, turn)| {
            let next = turn.next.filter(|next| *next <= now)?;
            Some((next, task, turn))
        });
        let (_, task, turn) = due.min_by_key(|(next, ..)| *next)?;
        turn.next = None;
        Some(task.clone())
    }

    /// A try has ended.
    fn tried(&mut self, task: &Task, done: bool, now: Instant) {
        if done {
            self.tasks.remove(task);
        } else if let Some(turn) = self.tasks.get_mut(task) {
            turn.pause = (turn.pause * 2).min(LONGEST_PAUSE);
            turn.next = Some(now + turn.pause);
        }
    }

    fn next(&self) -> Option<Instant> {
        self.tasks.values().filter_map(|turn| turn.next).min()
    }
}

/// Works until slipwayd ends.
pub async fn run(daemon: Arc<Daemon>) {
    let mut plan = Plan::default();
    let mut tries: JoinSet<(Task, bool)> = JoinSet::new();
    loop {
        plan.look(unfinished(&daemon), Instant::now());
        while tries.len() < AT_ONCE
            && let Some(task) = plan.take_due(Instant::now())
        {
            let daemon = daemon.clone();
            tries.spawn(async move {
                let done = attempt(&daemon, &task).await;
                (task, done)
            });
        }
        let full = tries.len() >= AT_ONCE;
        let next = plan.next().filter(|_| !full);
        tokio::select! {
            () = daemon.janitor.work.notified() => {}
            () = until(next) => {}
            Some(tried) = tries.join_next() => match tried {
                Ok((task, done)) => plan.tried(&task, done, Instant::now()),
                // Which one it was is not known any more: all are looked at anew.
                Err(_) => plan = Plan::default(),
            },
        }
    }
}

/// Looks for dead builds now and then, until slipwayd ends: one look at a time, however long it takes.
pub async fn builds(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(BUILDS).await;
        if let Err(error) = super::builds::bury(&daemon).await {
            tracing::warn!(error = error.chain(), "dead builds could not be looked for");
        }
    }
}

async fn until(next: Option<Instant>) {
    match next {
        Some(next) => tokio::time::sleep_until(next).await,
        None => std::future::pending().await,
    }
}

/// Everything that is neither as it was nor as it should become.
fn unfinished(daemon: &Daemon) -> Vec<Task> {
    let releases = daemon.releases.all().into_iter().map(|r| Task::Release(r.pod));
    let pods = daemon.registry.pods().into_iter().filter_map(|pod| {
        let alone = pod.shim().is_none();
        let unfinished = match pod.phase() {
            PodPhase::Removing => true,
            PodPhase::Ready | PodPhase::Starting | PodPhase::Stopping => alone,
            // Its shim is dead, and nobody has said so of its containers yet.
            PodPhase::NotReady { .. } => {
                alone && daemon.registry.containers_of(pod.id()).iter().any(|c| c.live())
            }
            PodPhase::Stopped => false,
        };
        unfinished.then(|| Task::Pod(pod.id().clone()))
    });
    let containers = daemon.registry.containers().into_iter().filter_map(|container| {
        if matches!(container.phase(), ContainerPhase::Removing(_)) {
            return Some(Task::Container(container.id().clone()));
        }
        fault::unfinished(&container).then(|| Task::Fault(container.id().clone()))
    });
    releases.chain(pods).chain(containers).collect()
}

/// One try; whether there is nothing left to do.
async fn attempt(daemon: &Arc<Daemon>, task: &Task) -> bool {
    match once(daemon, task).await {
        Ok(()) => true,
        // Somebody at work on it will see to it; whether they did is looked at again.
        Err(Error::Busy { .. }) => false,
        Err(error) => {
            tracing::warn!(?task, error = error.chain(), "still not done; trying again later");
            false
        }
    }
}

async fn once(daemon: &Arc<Daemon>, task: &Task) -> Result<(), Error> {
    match task {
        Task::Release(pod) => network::retry_release(daemon, pod).await,
        Task::Pod(id) => {
            let Ok(pod) = daemon.registry.pod(id.as_str()) else {
                return Ok(());
            };
            drop(pod.try_begin("a look at it")?);
            super::recover_pod(daemon, &pod).await
        }
        Task::Container(id) => {
            let Ok(container) = daemon.registry.container(id.as_str()) else {
                return Ok(());
            };
            let _turn = container.try_begin("finishing its removal")?;
            containers::remove_held(daemon, &container).await
        }
        Task::Fault(id) => match daemon.registry.container(id.as_str()) {
            Ok(container) => fault::finish(daemon, &container).await,
            Err(_) => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Task {
        Task::Pod(PodId::random().unwrap())
    }

    #[tokio::test]
    async fn one_that_fails_or_hangs_delays_no_other() {
        let (slow, quick) = (pod(), pod());
        let mut now = Instant::now();
        let mut plan = Plan::default();
        plan.look(vec![slow.clone(), quick.clone()], now);
        assert_eq!(
            plan.take_due(now),
            None,
            "a first pause for whoever is still at it"
        );
        now += FIRST_PAUSE;
        let first = plan.take_due(now).unwrap();
        let second = plan.take_due(now).unwrap();
        assert_ne!(first, second);
        assert_eq!(plan.take_due(now), None);
        // The slow one is still at it while the quick one fails and is tried again, and again.
        for tries in 1..4 {
            plan.tried(&quick, false, now);
            now += FIRST_PAUSE * 2u32.pow(tries);
            assert_eq!(plan.take_due(now), Some(quick.clone()));
        }
        plan.tried(&quick, true, now);
        plan.look(vec![slow.clone()], now);
        assert_eq!(plan.next(), None, "only the hanging one is left");
    }

    #[tokio::test]
    async fn pauses_grow_up_to_a_bound_and_what_is_done_is_forgotten() {
        let task = pod();
        let mut now = Instant::now();
        let mut plan = Plan::default();
        plan.look(vec![task.clone()], now);
        for _ in 0..20 {
            now = plan.next().unwrap();
            assert_eq!(plan.take_due(now), Some(task.clone()));
            plan.tried(&task, false, now);
        }
        assert_eq!(plan.next(), Some(now + LONGEST_PAUSE));
        plan.look(Vec::new(), now);
        assert_eq!(plan.next(), None, "somebody else has finished it");
    }
}
